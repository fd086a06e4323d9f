# SPDX-License-Identifier: BSD-3-Clause
# A mask, or lengths, of a call -> a byte for each position in the order of memory, and for each
# block how many of its positions count. All channels share it. Read once, before the phases.
#
# May look at masks and lengths. May not look at tensors, allocate. A part of core.pyx.

cdef enum:
    MANY_WORDS = 31         # of 8 bytes, whose sums of one bit each fit into 8 bits

cdef struct MaskAxes:
    # Of the positions, slowest first, those of the instances among them.
    int n
    Py_ssize_t shape[MAX_DIMENSIONS]
    Py_ssize_t strides[MAX_DIMENSIONS]      # of the bytes of the mask
    int instance            # where the axis of the instances is among them; NO_AXIS: nowhere
    int length              # where that of the lengths is


cdef inline bint has_mask(const fastbn_call* call) noexcept nogil:
    return call.mask.data != NULL or call.lengths != NULL


cdef inline Py_ssize_t count_masks(const Problem* p) noexcept nogil:
    # Instances, however many parts each of them has.
    return p.instances // p.channel_parts


cdef inline Py_ssize_t count_prefixes(const Request* r) noexcept nogil:
    # Of one instance: 0, unless runs are long and count in part.
    cdef const View* view = &r.job.problem.view
    if not r.job.plan.long_runs or view.inner == 1:
        return 0
    return view.outer * view.middle * r.job.plan.parts


cdef size_t lay_out_mask(const Request* r, Mask* mask, char* memory) noexcept nogil:
    # Returns the size; to know that, NULL will do.
    cdef char* place = memory
    cdef Py_ssize_t masks = count_masks(&r.job.problem)
    if not has_mask(&r.call) or r.empty:
        return 0
    mask.counts = <Py_ssize_t*>place
    mask.firsts = mask.counts + masks
    place += 2 * masks * sizeof(Py_ssize_t)
    mask.blocks = <BlockMask*>place
    place += masks * r.job.plan.blocks * sizeof(BlockMask)
    if r.job.problem.group > 1:
        mask.group_blocks = <BlockMask*>place
        place += masks * r.group_job.plan.blocks * sizeof(BlockMask)
    mask.prefixes = NULL
    if count_prefixes(r):
        mask.prefixes = <Py_ssize_t*>place
        place += masks * count_prefixes(r) * sizeof(Py_ssize_t)
    mask.bytes = <signed char*>place
    mask.period = r.job.problem.view.inner
    place += masks * values_of_a_channel(&r.job.problem.view) + MASK_PADDING
    return ceil_div(place - memory, LINE) * LINE


# ---- bytes of the positions ----------------------------------------------------------

cdef MaskAxes axes_of_mask(const Request* r) noexcept nogil:
    cdef const fastbn_call* call = &r.call
    cdef int i, axis
    cdef MaskAxes a
    a.n, a.instance, a.length = 0, NO_AXIS, NO_AXIS
    for i in range(r.order.n):
        axis = r.order.axes[i]
        if axis == call.channel_axis:
            continue
        if axis == call.sample_axis:
            a.instance = a.n
        if axis == call.length_axis:
            a.length = a.n
        a.shape[a.n] = call.shape[axis]
        a.strides[a.n] = call.mask.strides[axis] if call.mask.data != NULL else 0
        a.n += 1
    if a.n == 0:        # one position
        a.n, a.shape[0], a.strides[0] = 1, 1, 0
    return a


cdef inline signed char bits_of(bint counts) noexcept nogil:
    return -1 if counts else 0


cdef void read_mask(const signed char* given, Py_ssize_t stride, Py_ssize_t n,
                    signed char* to) noexcept nogil:
    # Along one axis.
    cdef Py_ssize_t i
    if stride == 0:
        memset(to, bits_of(given[0] != 0), n)
    elif stride == 1:       # by itself, so that it becomes vectors
        for i in range(n):
            to[i] = -<signed char>(given[i] != 0)
    else:
        for i in range(n):
            to[i] = bits_of(given[i * stride] != 0)


cdef void read_lengths(const int64_t* lengths, const MaskAxes* a, const Py_ssize_t* at,
                       signed char* to) noexcept nogil:
    # Along the fastest axis, where the others are `at`.
    cdef int fast = a.n - 1
    cdef Py_ssize_t i, n = a.shape[fast]
    cdef Py_ssize_t place = at[a.length] if a.length != NO_AXIS else 0
    cdef Py_ssize_t length = lengths[at[a.instance] if a.instance != NO_AXIS else 0]
    if a.instance == fast:
        for i in range(n):
            to[i] = bits_of(place < lengths[i])
    elif a.length == fast:
        memset(to, -1, length)
        memset(to + length, 0, n - length)
    else:
        memset(to, bits_of(place < length), n)


cdef void read_positions(const Request* r, signed char* to) noexcept nogil:
    cdef MaskAxes a = axes_of_mask(r)
    cdef Py_ssize_t at[MAX_DIMENSIONS]
    cdef const signed char* given = <const signed char*>r.call.mask.data
    cdef int axis, fast = a.n - 1
    memset(at, 0, sizeof(at))
    while True:
        if given != NULL:
            read_mask(given, a.strides[fast], a.shape[fast], to)
        else:
            read_lengths(r.call.lengths, &a, at, to)
        to += a.shape[fast]
        axis = fast - 1
        while axis >= 0:
            at[axis] += 1
            if given != NULL:
                given += a.strides[axis]
            if at[axis] < a.shape[axis]:
                break
            if given != NULL:
                given -= a.shape[axis] * a.strides[axis]
            at[axis] = 0
            axis -= 1
        if axis < 0:
            return


# ---- how many count ------------------------------------------------------------------

cdef inline uint64_t word_at(const signed char* bytes) noexcept nogil:
    cdef uint64_t word
    memcpy(&word, bytes, sizeof(word))
    return word & 0x0101010101010101ULL


cdef inline Py_ssize_t sum_of_bytes(uint64_t word) noexcept nogil:
    # Of at most 255.
    return word * 0x0101010101010101ULL >> 56


cdef Py_ssize_t count_bytes(const signed char* bytes, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i = 0, k, words, count = 0
    cdef uint64_t sums
    while i + 8 <= n:
        sums, words = 0, minimum(MANY_WORDS, (n - i) // 8)
        for k in range(words):
            sums += word_at(bytes + i + 8 * k)
        count += sum_of_bytes(sums)
        i += 8 * words
    for k in range(i, n):
        count -= bytes[k]
    return count


cdef Py_ssize_t find_byte(const signed char* bytes, Py_ssize_t k) noexcept nogil:
    # Where the one is that k others precede.
    cdef Py_ssize_t i = 0, count
    while True:
        count = sum_of_bytes(word_at(bytes + i))
        if count > k:
            break
        k -= count
        i += 8
    while True:
        if bytes[i]:
            if k == 0:
                return i
            k -= 1
        i += 1


cdef inline Py_ssize_t rank_in_run(const signed char* run, Py_ssize_t period, Py_ssize_t count,
                                   Py_ssize_t at) noexcept nogil:
    # How many count before a place of a run that repeats its bytes.
    return at // period * count + count_bytes(run, at % period)


cdef struct BlockOfRuns:
    # The positions of a block.
    const signed char* run      # the first one
    Py_ssize_t period
    Py_ssize_t runs
    Py_ssize_t inner
    Py_ssize_t offset
    Py_ssize_t length


cdef Py_ssize_t count_in_block(const BlockOfRuns* b) noexcept nogil:
    cdef Py_ssize_t i, in_run, count = 0
    cdef const signed char* run
    if b.period == b.inner:         # side by side
        return count_bytes(b.run + b.offset, b.runs * b.length)
    if b.period == 1:
        return b.length * count_bytes(b.run, b.runs)
    for i in range(b.runs):
        run = b.run + i * b.period
        in_run = count_bytes(run, b.period)
        count += (rank_in_run(run, b.period, in_run, b.offset + b.length)
                  - rank_in_run(run, b.period, in_run, b.offset))
    return count


cdef Py_ssize_t find_in_block(const BlockOfRuns* b, Py_ssize_t k) noexcept nogil:
    # The position that k others precede.
    cdef Py_ssize_t i = 0, in_run, before, count
    cdef const signed char* run
    if b.period == b.inner:
        return find_byte(b.run + b.offset, k)
    if b.period == 1:
        return find_byte(b.run, k // b.length) * b.length + k % b.length
    while True:
        run = b.run + i * b.period
        in_run = count_bytes(run, b.period)
        before = rank_in_run(run, b.period, in_run, b.offset)
        count = rank_in_run(run, b.period, in_run, b.offset + b.length) - before
        if k < count:
            k += before
            return (i * b.length + k // in_run * b.period + find_byte(run, k % in_run)
                    - b.offset)
        k -= count
        i += 1


cdef void survey_blocks(const signed char* bytes, Py_ssize_t period, const View* view,
                        const Plan* plan, BlockMask* to) noexcept nogil:
    cdef Py_ssize_t i, k, run
    cdef BlockOfRuns b
    b.period, b.inner = period, view.inner
    for i in range(plan.blocks):
        run = i // plan.parts * plan.block_runs
        b.run = bytes + run * period
        b.runs = minimum(plan.block_runs, view.outer * view.middle - run)
        b.offset = i % plan.parts * plan.block_length
        b.length = minimum(plan.block_length, view.inner - b.offset)
        to[i].count = count_in_block(&b)
        if to[i].count in (0, b.runs * b.length):       # then nobody asks where
            continue
        for k in range(PROBES):
            to[i].probes[k] = find_in_block(&b, k * (to[i].count - 1) // (PROBES - 1))


cdef void survey_runs(const Request* r, const signed char* bytes, Py_ssize_t* to) noexcept nogil:
    # Of each part of each run, what `prefixes` has.
    cdef const View* view = &r.job.problem.view
    cdef Py_ssize_t run, part, n, count
    for run in range(view.outer * view.middle):
        for part in range(r.job.plan.parts):
            n = minimum(r.job.plan.block_length, view.inner - part * r.job.plan.block_length)
            count = count_bytes(bytes, n)
            to[0] = count if count_bytes(bytes, count) == count else -1
            to += 1
            bytes += n


cdef void survey_instance(const Request* r, Py_ssize_t i) noexcept nogil:
    cdef const Mask* mask = &r.job.buffers.mask
    cdef const View* view = &r.job.problem.view
    cdef Py_ssize_t n = values_of_a_channel(view)
    cdef const signed char* bytes = mask.bytes + i * n
    cdef Py_ssize_t count = count_bytes(bytes, n)
    (<Py_ssize_t*>mask.counts)[i] = count
    (<Py_ssize_t*>mask.firsts)[i] = find_byte(bytes, 0) if count else 0
    if count == n:
        return
    survey_blocks(bytes, mask.period, view, &r.job.plan,
                  <BlockMask*>mask.blocks + i * r.job.plan.blocks)
    if r.job.problem.group > 1:
        survey_blocks(bytes, mask.period, &r.group_job.problem.view, &r.group_job.plan,
                      <BlockMask*>mask.group_blocks + i * r.group_job.plan.blocks)
    if mask.prefixes != NULL:
        survey_runs(r, bytes, <Py_ssize_t*>mask.prefixes + i * count_prefixes(r))


# ---- the mask of a request -----------------------------------------------------------

cdef int check_lengths(Request* r) noexcept nogil:
    cdef const fastbn_call* call = &r.call
    cdef Py_ssize_t i
    if call.lengths == NULL:
        return FASTBN_OK
    for i in range(call.shape[call.sample_axis]):
        if not 0 <= call.lengths[i] <= call.shape[call.length_axis]:
            return fail(r, FASTBN_BAD_MASK, ARG_LENGTHS)
    return FASTBN_OK


cdef int take_mask(Request* r) noexcept nogil:
    # Once there is memory for it.
    cdef Mask* mask = &r.job.buffers.mask
    cdef Py_ssize_t i, count = 0, masks = count_masks(&r.job.problem)
    if not has_mask(&r.call) or r.empty:
        return FASTBN_OK
    if check_lengths(r) != FASTBN_OK:
        return r.fault.code
    read_positions(r, <signed char*>mask.bytes)
    for i in range(masks):
        survey_instance(r, i)
        count += mask.counts[i]
    mask.count, mask.first = mask.counts[0], mask.firsts[0]
    r.nothing = count == 0
    r.counted = count
    if count == masks * values_of_a_channel(&r.job.problem.view):
        memset(mask, 0, sizeof(Mask))
    if count == 1 and r.call.norm == FASTBN_BATCH_NORM and not r.extras.part and (
            r.call.operation in (FASTBN_FORWARD, FASTBN_BACKWARD)):
        return fail(r, FASTBN_ONE_VALUE, ARG_MASK)
    return FASTBN_OK


cdef inline Py_ssize_t values_that_count(const Request* r) noexcept nogil:
    # Of a channel of a batch.
    if r.empty:
        return 0
    return r.counted if has_mask(&r.call) else values_of_a_channel(&r.job.problem.view)


cdef void move_mask_to_instance(const Request* r, Mask* mask, Py_ssize_t i) noexcept nogil:
    cdef Py_ssize_t n = values_of_a_channel(&r.job.problem.view)
    i //= r.job.problem.channel_parts
    if mask.bytes == NULL:
        return
    mask.count, mask.first = mask.counts[i], mask.firsts[i]
    mask.bytes = mask.bytes + i * n if mask.count < n else NULL
    mask.blocks += i * r.job.plan.blocks
    if mask.group_blocks != NULL:
        mask.group_blocks += i * r.group_job.plan.blocks
    if mask.prefixes != NULL:
        mask.prefixes += i * count_prefixes(r)

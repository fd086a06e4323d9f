# SPDX-License-Identifier: BSD-3-Clause
# Any elementwise pass where there is a mask: what counts is written by the kernel of that
# pass, elsewhere there are zeros. Blocks of which all counts are written as ever, those of
# which nothing does are not read. Of the others the kernel gets a part at a time, with a byte
# for each element of the output, in the order of memory (WrittenMask).
#
# May: call the kernel of a pass with a part of its job, write zeros. May not: compute.

cdef enum:
    PIECE = 8192            # elements of a part, at most: their bytes stay in L1

cdef struct Pass:
    # Which kernel writes, and to what.
    TileKernel kernel
    const Operand* out
    bint streaming

cdef struct Part:
    # Of neighbouring channels and runs, some elements.
    Py_ssize_t channel, channels
    Py_ssize_t run, runs
    Py_ssize_t offset, length


cdef inline Py_ssize_t runs_without_jump(const Job* job, Py_ssize_t run,
                                         Py_ssize_t most) noexcept nogil:
    # Within one step of `outer`, as those of a part that a kernel gets.
    cdef Py_ssize_t middle = job.problem.view.middle
    return most if job.problem.view.outer == 1 else minimum(most, middle - run % middle)


# ---- zeros ---------------------------------------------------------------------------

cdef void zero_elements(elem* to, Py_ssize_t n, bint streaming) noexcept nogil:
    # Whole lines go past the cache, if any does.
    cdef Py_ssize_t i = 0, end
    if streaming:
        i = minimum(n, to_line(to))
        end = i + (n - i) // LINE * LINE
        memset(to, 0, i * sizeof(elem))
        while i < end:
            stream(to + i, set1(0))
            i += WIDTH
    memset(to + i, 0, (n - i) * sizeof(elem))


cdef void zero_part(const Job* job, const Pass* way, const Part* part) noexcept nogil:
    cdef Py_ssize_t i, c, inner = job.problem.view.inner
    cdef bint adjacent = part.length == inner == way.out.channel
    if adjacent and part.channels == job.problem.view.channels and gapless_runs(job, way.out):
        zero_elements(element(job, way.out, 0, part.run, 0), part.runs * part.channels * inner,
                      way.streaming)
        return
    for i in range(part.run, part.run + part.runs):
        if adjacent:
            zero_elements(element(job, way.out, part.channel, i, 0), part.channels * inner,
                          way.streaming)
            continue
        for c in range(part.channel, part.channel + part.channels):
            zero_elements(element(job, way.out, c, i, part.offset), part.length, way.streaming)


# ---- parts ---------------------------------------------------------------------------

cdef inline void move_to(const Job* job, Operand* operand, const Part* part) noexcept nogil:
    if operand.data != NULL:
        operand.data = element(job, operand, 0, part.run, part.offset)
        operand.outer = part.runs * operand.middle      # there is no jump


cdef void write_part(const Job* job, const Pass* way, const Part* part,
                     const signed char* bytes) noexcept nogil:
    # As a job of one block. `bytes`: of what it writes; NULL: all of it counts.
    cdef Job own = job[0]
    move_to(job, &own.buffers.x, part)
    move_to(job, &own.buffers.dy, part)
    move_to(job, &own.buffers.dy_of_y, part)
    move_to(job, &own.buffers.out, part)
    move_to(job, &own.buffers.residual, part)
    own.buffers.mask.bytes = NULL
    own.buffers.written_mask.bytes = bytes
    own.buffers.written_mask.start = element(job, way.out, part.channel, part.run, part.offset)
    own.problem.view.outer, own.problem.view.middle = 1, part.runs
    own.problem.view.inner = part.length
    own.plan.block_runs, own.plan.block_length = part.runs, part.length
    own.plan.parts = own.plan.blocks = 1
    own.plan.fetch_next = False
    if along_runs(job, 0):      # any channel may be the first
        own.plan.tile_channels, own.plan.tiles = 1, job.problem.view.channels
    way.kernel(&own, part.channel // own.plan.tile_channels,
               ceil_div(part.channel + part.channels, own.plan.tile_channels), 0, 1)


cdef void repeat_for_channels(const Job* job, const Part* part, signed char* to) noexcept nogil:
    # The bytes of whole runs, which all channels share.
    cdef const Mask* mask = &job.buffers.mask
    cdef Py_ssize_t i, c
    for i in range(part.run, part.run + part.runs):
        if part.length == 1:
            fill_mask(to, mask.bytes[i], part.channels)
            to += part.channels
            continue
        for c in range(part.channels):
            memcpy(to, mask.bytes + i * mask.period + part.offset, part.length)
            to += part.length


cdef void write_with_bytes(const Job* job, const Pass* way, const Part* part) noexcept nogil:
    # At most PIECE elements, which lie in a row in the output.
    cdef signed char bytes[PIECE + MASK_PADDING]
    repeat_for_channels(job, part, bytes)
    write_part(job, way, part, bytes)


cdef void write_then_zero(const Job* job, const Pass* way, const Part* part) noexcept nogil:
    # An output whose channels lie apart.
    cdef const Mask* mask = &job.buffers.mask
    cdef Py_ssize_t run, c, i
    write_part(job, way, part, NULL)
    for run in range(part.run, part.run + part.runs):
        for c in range(part.channel, part.channel + part.channels):
            for i in range(part.offset, part.offset + part.length):
                if not mask.bytes[run * mask.period + i]:
                    memset(element(job, way.out, c, run, i), 0, sizeof(elem))


# ---- blocks --------------------------------------------------------------------------

cdef void write_long_runs(const Job* job, const Pass* way, const Part* block) noexcept nogil:
    # Of as many channels as fit, or a part of one.
    cdef Py_ssize_t length = minimum(block.length, PIECE), i, k, run, most = 1
    cdef Part part = block[0]
    if block.length == job.problem.view.inner == way.out.channel:
        most = PIECE // length
    part.runs = 1
    for run in range(block.run, block.run + block.runs):
        part.run = run
        for i in range(ceil_div(block.channels, most)):
            part.channel = block.channel + i * most
            part.channels = minimum(most, block.channels - i * most)
            for k in range(ceil_div(block.length, length)):
                part.offset = block.offset + k * length
                part.length = minimum(length, block.length - k * length)
                write_with_bytes(job, way, &part)


cdef void write_short_runs(const Job* job, const Pass* way, Py_ssize_t t0, Py_ssize_t t1,
                           const Part* block) noexcept nogil:
    # As many as fit of all channels, if they lie in a row, else one of each tile.
    cdef bint adjacent = way.out.channel == job.problem.view.inner
    cdef bint together = (block.channels == job.problem.view.channels
                          and block.channels * block.length <= PIECE
                          and gapless_runs(job, way.out))
    cdef Py_ssize_t tile = t0, end = block.run + block.runs, most
    cdef Part part = block[0]
    while tile < t1:
        if not together:
            part.channel, part.channels = first_channel(job, tile), count_channels(job, tile)
        most = PIECE // (part.channels * part.length) if together or not adjacent else 1
        part.run = block.run
        while part.run < end:
            part.runs = minimum(most, runs_without_jump(job, part.run, end - part.run))
            if adjacent:
                write_with_bytes(job, way, &part)
            else:
                write_then_zero(job, way, &part)
            part.run += part.runs
        tile = t1 if together else tile + 1


cdef void write_extents(const Job* job, const Pass* way, const Part* block) noexcept nogil:
    # Of runs whose first elements count, none but these are read; but past the cache, where a
    # line that is written in two parts has to be read, they all are.
    cdef Block whole = Block(block.run, block.runs, block.offset, block.length, NULL)
    cdef Part part = block[0]
    cdef Py_ssize_t run, extent
    part.runs = 1
    for run in range(block.run, block.run + block.runs):
        part.run, part.offset, part.length = run, block.offset, block.length
        extent = extent_of_run(job, &whole, run)
        if extent < 0 or (way.streaming and 0 < extent < block.length):
            write_long_runs(job, way, &part)
            continue
        part.length = extent
        if extent > 0:
            write_part(job, way, &part, NULL)
        part.offset, part.length = block.offset + extent, block.length - extent
        if part.length > 0:
            zero_part(job, way, &part)


cdef void write_stretch(const Job* job, const Pass* way, const BlockMask* mask,
                        const Part* block) noexcept nogil:
    # Of rows that count in one stretch: that alone is read.
    cdef Part part = block[0]
    cdef Py_ssize_t end = block.run + mask.probes[0] + mask.count
    part.runs = mask.probes[0]
    if part.runs > 0:
        zero_part(job, way, &part)
    part.run += part.runs
    while part.run < end:
        part.runs = runs_without_jump(job, part.run, end - part.run)
        write_part(job, way, &part, NULL)
        part.run += part.runs
    part.runs = block.run + block.runs - end
    if part.runs > 0:
        zero_part(job, way, &part)


cdef void write_counted_block(const Job* job, const Pass* way, Py_ssize_t t0, Py_ssize_t t1,
                              Py_ssize_t index) noexcept nogil:
    # Of which a part counts, or nothing.
    cdef const BlockMask* mask = &job.buffers.mask.blocks[index]
    cdef Block block = block_at(job, index)
    cdef Part part = Part(first_channel(job, t0), channels_of_tiles(job, t0, t1), block.run,
                          block.runs, block.offset, block.length)
    if mask.count == 0:
        zero_part(job, way, &part)
    elif job.problem.view.inner == 1 and is_one_stretch(mask):
        write_stretch(job, way, mask, &part)
    elif job.buffers.mask.prefixes != NULL:
        write_extents(job, way, &part)
    elif job.problem.view.inner > 1 and along_runs(job, 0):
        write_long_runs(job, way, &part)
    else:
        write_short_runs(job, way, t0, t1, &part)


cdef void write_counted(const Job* job, const Pass* way, Py_ssize_t t0, Py_ssize_t t1,
                        Py_ssize_t b0, Py_ssize_t b1) noexcept nogil:
    cdef Py_ssize_t b = b0, end
    cdef Job whole = job[0]
    whole.buffers.mask.bytes = NULL
    while b < b1:
        end = b + 1
        if all_counts(job, b):
            while end < b1 and all_counts(job, end):
                end += 1
            way.kernel(&whole, t0, t1, b, end)
        else:
            write_counted_block(job, way, t0, t1, b)
        b = end
    if way.streaming:
        flush_stream()


cdef void write_zeros(const Job* job, const Pass* way, Py_ssize_t t0, Py_ssize_t t1,
                      Py_ssize_t b0, Py_ssize_t b1) noexcept nogil:
    cdef Py_ssize_t b
    cdef Block block
    cdef Part part
    for b in range(b0, b1):
        block = block_at(job, b)
        part = Part(first_channel(job, t0), channels_of_tiles(job, t0, t1), block.run, block.runs,
                    block.offset, block.length)
        zero_part(job, way, &part)
    if way.streaming:
        flush_stream()

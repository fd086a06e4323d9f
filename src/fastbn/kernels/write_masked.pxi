# SPDX-License-Identifier: BSD-3-Clause
# Any elementwise pass where there is a mask: what counts is written by the kernel of that
# pass, elsewhere there are zeros. Blocks of which all counts are written as ever, those of
# which nothing does are not read. Of the others a kernel writes runs that count; or, where
# runs count in part, some elements to L1, which are then written where the mask is set.
#
# May: call the kernel of a pass with a part of its job, copy, write zeros. May not: compute.

cdef enum:
    PIECE = 4096            # elements that are written to L1 first, at most

cdef struct Piece:
    lanes aligned           # unused: the array begins where a register may
    elem out[PIECE + COLUMNS + PADDING]

cdef struct Pass:
    # Which kernel writes, and to what.
    TileKernel kernel
    const Operand* out
    bint to_dy              # `out` is dy of the job
    bint streaming


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


cdef void zero_part(const Job* job, const Pass* way, Py_ssize_t channel, Py_ssize_t channels,
                    Py_ssize_t run, Py_ssize_t runs, Py_ssize_t offset,
                    Py_ssize_t length) noexcept nogil:
    # Of some channels and runs, some elements.
    cdef Py_ssize_t i, c, inner = job.problem.view.inner
    cdef bint adjacent = length == inner == way.out.channel
    if adjacent and channels == job.problem.view.channels and gapless_runs(job, way.out):
        zero_elements(element(job, way.out, 0, run, 0), runs * channels * inner, way.streaming)
        return
    for i in range(run, run + runs):
        if adjacent:
            zero_elements(element(job, way.out, channel, i, 0), channels * inner, way.streaming)
            continue
        for c in range(channel, channel + channels):
            zero_elements(element(job, way.out, c, i, offset), length, way.streaming)


cdef void copy_masked(const elem* given, const signed char* mask, Py_ssize_t n, bint streaming,
                      elem* to) noexcept nogil:
    # Elements where the mask is set, else zeros. May read, not write, up to the end of a
    # register.
    cdef Py_ssize_t i = minimum(n, to_alignment(to)) if streaming else 0
    cdef const elem* lines = to + (minimum(n, to_line(to)) if streaming else n)
    cdef const elem* lines_end = lines + (to + n - lines) // LINE * LINE
    cdef lanes v
    if i:
        store_n(to, and_bits(load(given), mask_bits(mask)), i)
    while i + WIDTH <= n:
        v = and_bits(load(given + i), mask_bits(mask + i))
        if lines <= to + i < lines_end:
            stream(to + i, v)
        else:
            store(to + i, v)
        i += WIDTH
    if i < n:
        store_n(to + i, and_bits(load(given + i), mask_bits(mask + i)), n - i)


cdef inline void move_to(const Job* job, Operand* operand, Py_ssize_t run,
                         Py_ssize_t offset) noexcept nogil:
    if operand.data != NULL:
        operand.data = element(job, operand, 0, run, offset)


cdef Job part_of(const Job* job, Py_ssize_t run, Py_ssize_t runs, Py_ssize_t offset,
                 Py_ssize_t length) noexcept nogil:
    # As one block all of which counts. The runs lie within one step of `outer`.
    cdef Job part = job[0]
    move_to(job, &part.buffers.x, run, offset)
    move_to(job, &part.buffers.dy, run, offset)
    move_to(job, &part.buffers.dy_of_y, run, offset)
    move_to(job, &part.buffers.out, run, offset)
    move_to(job, &part.buffers.residual, run, offset)
    part.buffers.mask.bytes = NULL
    part.problem.view.outer, part.problem.view.middle = 1, runs
    part.problem.view.inner = length
    part.plan.block_runs, part.plan.block_length = runs, length
    part.plan.parts = part.plan.blocks = 1
    part.plan.fetch_next = False
    return part


cdef inline Py_ssize_t runs_without_jump(const Job* job, Py_ssize_t run,
                                         Py_ssize_t most) noexcept nogil:
    cdef Py_ssize_t middle = job.problem.view.middle
    return most if job.problem.view.outer == 1 else minimum(most, middle - run % middle)


cdef void write_through_copy(const Job* job, const Pass* way, Py_ssize_t tile, Py_ssize_t run,
                             Py_ssize_t runs, Py_ssize_t offset,
                             Py_ssize_t length) noexcept nogil:
    # At most PIECE elements of a tile.
    cdef Piece piece
    cdef Job part = part_of(job, run, runs, offset, length)
    cdef Py_ssize_t channel = first_channel(job, tile), channels = count_channels(job, tile)
    cdef Operand* out = &part.buffers.dy if way.to_dy else &part.buffers.out
    cdef const signed char* mask = job.buffers.mask.bytes + offset
    cdef const elem* given
    cdef Py_ssize_t i, c
    out.channel, out.middle = length, channels * length
    out.data = piece.out - channel * length
    part.plan.streaming = False
    way.kernel(&part, tile, tile + 1, 0, 1)
    for i in range(runs):
        for c in range(channels):
            given = piece.out + (i * channels + c) * length
            copy_masked(given, mask + (run + i) * job.problem.view.inner, length, way.streaming,
                        element(job, way.out, channel + c, run + i, offset))


cdef void write_masked_long(const Job* job, const Pass* way, Py_ssize_t tile, const Block* block,
                            Py_ssize_t run) noexcept nogil:
    # One run of each channel, in parts that fit.
    cdef Py_ssize_t most = PIECE // count_channels(job, tile) // PADDING * PADDING
    cdef Py_ssize_t i, length, pieces = ceil_div(block.length, most)
    for i in range(pieces):
        length = minimum(most, block.length - i * most)
        write_through_copy(job, way, tile, run, 1, block.offset + i * most, length)


cdef void write_masked_planes(const Job* job, const Pass* way, Py_ssize_t t0, Py_ssize_t t1,
                              const Block* block) noexcept nogil:
    # Runs that count in part.
    cdef Py_ssize_t channel = first_channel(job, t0), channels = channels_of_tiles(job, t0, t1)
    cdef Py_ssize_t run = block.run, end = block.run + block.runs, runs, tile, extent
    cdef Job part
    while run < end:
        extent = extent_of_run(job, block, run)
        runs = 1
        if extent >= 0:
            if extent > 0:
                part = part_of(job, run, 1, block.offset, extent)
                way.kernel(&part, t0, t1, 0, 1)
            zero_part(job, way, channel, channels, run, 1, block.offset + extent,
                      block.length - extent)
        elif job.plan.long_runs:
            for tile in range(t0, t1):
                write_masked_long(job, way, tile, block, run)
        else:
            runs = runs_without_jump(job, run, minimum(
                end - run, PIECE // (count_channels(job, t0) * block.length)))
            for tile in range(t0, t1):
                write_through_copy(job, way, tile, run, runs, 0, block.length)
        run += runs


cdef void write_masked_rows(const Job* job, const Pass* way, Py_ssize_t t0, Py_ssize_t t1,
                            Py_ssize_t index) noexcept nogil:
    # Runs that count or do not as a whole. One stretch of them is written alone; of several,
    # all of the block is, and then zeros.
    cdef const BlockMask* mask = &job.buffers.mask.blocks[index]
    cdef Py_ssize_t channel = first_channel(job, t0), channels = channels_of_tiles(job, t0, t1)
    cdef Block block = block_at(job, index)
    cdef Py_ssize_t runs, first, run = block.run, end = block.run + block.runs
    cdef Job part = job[0]
    if is_one_stretch(mask):
        run += mask.probes[0]
        first = run + mask.count
        while run < first:
            runs = runs_without_jump(job, run, first - run)
            part = part_of(job, run, runs, 0, 1)
            way.kernel(&part, t0, t1, 0, 1)
            run += runs
        run = block.run
    else:
        part.buffers.mask.bytes = NULL
        way.kernel(&part, t0, t1, index, index + 1)
    while run < end:
        first = run
        while run < end and not job.buffers.mask.bytes[run]:
            run += 1
        if run > first:
            zero_part(job, way, channel, channels, first, run - first, 0, 1)
        while run < end and job.buffers.mask.bytes[run]:
            run += 1


cdef void write_counted(const Job* job, const Pass* way, Py_ssize_t t0, Py_ssize_t t1,
                        Py_ssize_t b0, Py_ssize_t b1) noexcept nogil:
    cdef Py_ssize_t channel = first_channel(job, t0), channels = channels_of_tiles(job, t0, t1)
    cdef Py_ssize_t b = b0, end
    cdef Job whole = job[0]
    cdef Block block
    whole.buffers.mask.bytes = NULL
    while b < b1:
        block = block_at(job, b)
        end = b + 1
        if all_counts(job, b):
            while end < b1 and all_counts(job, end):
                end += 1
            way.kernel(&whole, t0, t1, b, end)
        elif job.buffers.mask.blocks[b].count == 0:
            zero_part(job, way, channel, channels, block.run, block.runs, block.offset,
                      block.length)
        elif job.problem.view.inner == 1:
            write_masked_rows(job, way, t0, t1, b)
        else:
            write_masked_planes(job, way, t0, t1, &block)
        b = end
    if way.streaming:
        flush_stream()


cdef void write_zeros(const Job* job, const Pass* way, Py_ssize_t t0, Py_ssize_t t1,
                      Py_ssize_t b0, Py_ssize_t b1) noexcept nogil:
    cdef Py_ssize_t channel = first_channel(job, t0), channels = channels_of_tiles(job, t0, t1), b
    cdef Block block
    for b in range(b0, b1):
        block = block_at(job, b)
        zero_part(job, way, channel, channels, block.run, block.runs, block.offset, block.length)
    if way.streaming:
        flush_stream()

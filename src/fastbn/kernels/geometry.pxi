# SPDX-License-Identifier: BSD-3-Clause
# Where the numbers of a task lie: tiles and blocks of a job as matrices in
# memory. May compute addresses; may not touch the elements.
#
#   a tile    neighbouring channels          (Plan.tile_channels)
#   a block   neighbouring runs of a tile    (Plan.block_runs x block_length)
#   a matrix  rows x columns: columns are neighbours in memory, rows are a
#             constant step apart, but for a jump where a sliced axis ends
#
# Rows (NHWC): a block is one matrix, a column is a channel. To sum fewer than
#   PIXELS channels, the matrix has PIXELS pixels in a row, and a channel every
#   `channels`-th column; what remains of a block is one more, shorter row.
# Planes with short runs: the same, a channel owns `inner` neighbouring columns.
# Planes with long runs: each run is one matrix of RUN_COLUMNS columns, which the
# channel owns; its last row may be a part of one, which sums in float64 take as a
# second matrix.

cdef struct Block:
    Py_ssize_t run, runs        # runs [run, run + runs) ...
    Py_ssize_t offset, length   # ... elements [offset, offset + length) of each
    const BlockMask* mask       # those of them that count; NULL: all do

cdef struct Matrix:
    elem* data
    Py_ssize_t rows
    Py_ssize_t columns
    Py_ssize_t step             # from a row to the next
    Py_ssize_t jump             # added after each ...
    Py_ssize_t jump_rows        # ... of so many rows, of which
    Py_ssize_t rows_before      # so many precede the first

cdef struct Features:
    # Of the elements from some place on; NULL: there are none.
    const real* weight
    const real* bias


cdef inline Py_ssize_t first_channel(const Job* job, Py_ssize_t tile) noexcept nogil:
    return tile * job.plan.tile_channels


cdef inline Py_ssize_t channels_of_tiles(const Job* job, Py_ssize_t t0,
                                         Py_ssize_t t1) noexcept nogil:
    return minimum(first_channel(job, t1), job.problem.view.channels) - first_channel(job, t0)


cdef inline Py_ssize_t count_channels(const Job* job, Py_ssize_t tile) noexcept nogil:
    return channels_of_tiles(job, tile, tile + 1)


cdef inline Py_ssize_t count_per_channel(const Job* job) noexcept nogil:
    return job.problem.view.outer * job.problem.view.middle * job.problem.view.inner


cdef inline Py_ssize_t columns_per_channel(const Job* job) noexcept nogil:
    return RUN_COLUMNS if job.plan.long_runs else job.problem.view.inner


cdef inline Block block_at(const Job* job, Py_ssize_t index) noexcept nogil:
    cdef Block block
    cdef Py_ssize_t part = index % job.plan.parts
    block.run = index // job.plan.parts * job.plan.block_runs
    block.runs = minimum(job.plan.block_runs,
                         job.problem.view.outer * job.problem.view.middle - block.run)
    block.offset = part * job.plan.block_length
    block.mask = NULL
    block.length = minimum(job.plan.block_length, job.problem.view.inner - block.offset)
    return block


cdef inline bint is_masked(const Job* job) noexcept nogil:
    return job.buffers.mask.bytes != NULL


cdef inline Py_ssize_t values_per_channel(const Job* job) noexcept nogil:
    # That count.
    return job.buffers.mask.count if is_masked(job) else count_per_channel(job)


cdef inline double count_of_batch(const Job* job) noexcept nogil:
    # Of which x may be a part.
    return job.problem.total if job.problem.total > 0.0 else <double>values_per_channel(job)


cdef inline bint counts_nothing(const Job* job) noexcept nogil:
    return is_masked(job) and job.buffers.mask.count == 0


cdef inline Py_ssize_t values_in(const Block* block) noexcept nogil:
    return block.mask.count if block.mask != NULL else block.runs * block.length


cdef inline bint is_one_stretch(const BlockMask* mask) noexcept nogil:
    # Is nothing left out between the first and the last position that count?
    return mask.probes[PROBES - 1] - mask.probes[0] + 1 == mask.count


cdef inline Block counted_block(const Job* job, Py_ssize_t index) noexcept nogil:
    # What counts of a block: all of it, all of some neighbouring runs, or what a mask says.
    cdef Block block = block_at(job, index)
    cdef const BlockMask* mask
    if not is_masked(job):
        return block
    mask = &job.buffers.mask.blocks[index]
    if mask.count == block.runs * block.length:
        return block
    if job.buffers.mask.period == 1 and mask.count > 0 and is_one_stretch(mask):
        block.run += mask.probes[0] // block.length
        block.runs = mask.count // block.length
        return block
    block.mask = mask
    return block


cdef inline bint all_counts(const Job* job, Py_ssize_t index) noexcept nogil:
    # Of a masked job, a block.
    cdef Block block = block_at(job, index)
    return job.buffers.mask.blocks[index].count == block.runs * block.length


cdef inline Py_ssize_t count_in_segment(const Job* job, Py_ssize_t segment) noexcept nogil:
    # Values of one channel in a segment.
    cdef Py_ssize_t b, count = 0
    cdef Block block
    for b in range(segment * job.plan.segment_blocks,
                   minimum((segment + 1) * job.plan.segment_blocks, job.plan.blocks)):
        block = counted_block(job, b)
        count += values_in(&block)
    return count


cdef inline Py_ssize_t extent_of_run(const Job* job, const Block* block,
                                     Py_ssize_t run) noexcept nogil:
    # How many elements of a block's run count, if they are its first; else -1.
    cdef const Mask* mask = &job.buffers.mask
    if mask.period == 1:
        return block.length if mask.bytes[run] else 0
    if mask.prefixes == NULL:
        return -1
    return mask.prefixes[run * job.plan.parts + block.offset // job.plan.block_length]


cdef inline elem* element(const Job* job, const Operand* operand, Py_ssize_t channel,
                          Py_ssize_t run, Py_ssize_t offset) noexcept nogil:
    cdef elem* start = <elem*>operand.data + channel * operand.channel + offset
    if job.problem.view.features and channel >= job.problem.period:
        return start + channel // job.problem.period * (
            operand.outer - job.problem.period * operand.channel)
    if job.problem.view.outer == 1:     # usual, and a division takes as long as a line of 64 bytes
        return start + run * operand.middle
    return (start + run // job.problem.view.middle * operand.outer
            + run % job.problem.view.middle * operand.middle)


cdef inline Py_ssize_t neighbours(const Job* job, const Operand* operand,
                                  Py_ssize_t channels) noexcept nogil:
    # How many channels have their columns side by side: all, or each alone.
    return channels if operand.channel == job.problem.view.inner else 1


cdef inline Matrix short_matrix(const Job* job, const Operand* operand, const Block* block,
                                Py_ssize_t channel, Py_ssize_t channels) noexcept nogil:
    cdef Matrix m
    m.data = element(job, operand, channel, block.run, block.offset)
    m.rows = block.runs
    m.columns = channels * block.length
    m.step = operand.middle
    m.jump_rows = job.problem.view.middle
    m.jump = operand.outer - m.jump_rows * m.step
    m.rows_before = block.run % m.jump_rows
    return m


cdef inline Matrix matrix_of_run(elem* data, Py_ssize_t length) noexcept nogil:
    # But for what is less than a row (`remainder_matrix`).
    cdef Matrix m
    m.data = data
    m.rows = length // RUN_COLUMNS
    m.columns = RUN_COLUMNS
    m.step = RUN_COLUMNS
    m.jump_rows = 1
    m.jump = 0
    m.rows_before = 0
    return m


cdef inline Matrix long_matrix(const Job* job, const Operand* operand, const Block* block,
                               Py_ssize_t channel, Py_ssize_t run) noexcept nogil:
    return matrix_of_run(element(job, operand, channel, run, block.offset), block.length)


cdef inline Matrix remainder_matrix(Matrix m, Py_ssize_t length) noexcept nogil:
    # What a long matrix leaves of its run: less than a row.
    m.data += m.rows * m.step
    m.columns = length - m.rows * m.step
    m.rows = 1 if m.columns else 0
    return m


cdef inline Matrix pixel_matrix(const Job* job, elem* data, Py_ssize_t runs) noexcept nogil:
    cdef Matrix m
    m.data = data
    m.rows = runs // PIXELS
    m.columns = PIXELS * job.problem.view.channels
    m.step = m.columns
    m.jump_rows = 1
    m.jump = 0
    m.rows_before = 0
    return m


cdef inline bint gapless_runs(const Job* job, const Operand* operand) noexcept nogil:
    # Do all runs of all channels lie in a row?
    cdef const View* view = &job.problem.view
    return (operand.channel == view.inner and operand.middle == view.channels * view.inner
            and (view.outer == 1 or operand.outer == view.middle * operand.middle))


cdef inline bint gapless(const Matrix* m) noexcept nogil:
    return m.jump == 0 and m.step == m.columns


cdef inline bint jumps(const Matrix* m, Py_ssize_t row, Py_ssize_t rows) noexcept nogil:
    # Is the step from row to row not constant within [row, row + rows)?
    return m.jump != 0 and (m.rows_before + row) % m.jump_rows + rows > m.jump_rows


cdef inline elem* row_at(const Matrix* m, Py_ssize_t row) noexcept nogil:
    if m.jump == 0:
        return m.data + row * m.step
    return m.data + row * m.step + (m.rows_before + row) // m.jump_rows * m.jump


cdef inline Features no_features() noexcept nogil:
    return Features(NULL, NULL)


cdef inline Features later_features(Features features, Py_ssize_t n) noexcept nogil:
    if features.weight == NULL:
        return features
    return Features(features.weight + n, features.bias + n)


cdef inline Features features_from(const Job* job, Py_ssize_t at) noexcept nogil:
    # In the caller's arrays, or in the workspace.
    cdef const real* copies = <const real*>job.buffers.features
    cdef const real* weight = <const real*>job.buffers.real_weight
    cdef const real* bias = <const real*>job.buffers.real_bias
    return Features((weight if weight != NULL else copies) + at,
                    (bias if bias != NULL else copies + job.problem.view.inner + WRAP) + at)

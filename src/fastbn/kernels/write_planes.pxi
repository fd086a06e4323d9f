# SPDX-License-Identifier: BSD-3-Clause
# The elementwise passes along runs: each is written with the coefficients of its channel.

cdef inline void write_adjacent_runs(const Job* job, const Activation* a, const Block* block,
                                     Py_ssize_t run, Py_ssize_t channel, Py_ssize_t channels,
                                     ptrdiff_t to_next, int variant) noexcept nogil:
    # The runs of neighbouring channels, which lie side by side: as one run, in whole
    # registers. (Past the cache a line that is not written as a whole has to be read.)
    cdef Pointers p = pointers_at(job, a, channel, run, block.offset, variant)
    cdef Py_ssize_t c, end, i = find_lines(&p, channels * block.length)
    cdef Coefficients coef, joined, next = coefficients_of(job, channel, variant)
    write_n(&p, 0, i, &next, variant)
    for c in range(1, channels + 1):
        end = c * block.length
        coef = next
        while i + WIDTH <= end:
            prefetch_next(&p, i, to_next, variant)
            write_vector(&p, i, &coef, variant)
            i += WIDTH
        if c == channels:
            write_n(&p, i, end - i, &coef, variant)
            return
        next = coefficients_of(job, channel + c, variant)
        if i < end:
            joined = coefficients_of_two(&coef, &next, end - i, variant)
            write_vector(&p, i, &joined, variant)
            i += WIDTH


cdef inline void write_runs(const Job* job, const Activation* a, Py_ssize_t channel,
                            Py_ssize_t channels, Py_ssize_t b0, Py_ssize_t b1,
                            int variant) noexcept nogil:
    # Image by image, since that is how they lie in memory.
    cdef Py_ssize_t together = all_neighbours(job, a, channels,
                                              variant) if job.plan.parts == 1 else 1
    cdef ptrdiff_t to_next = 0      # to the next tile, if it lies behind this one
    cdef Py_ssize_t b, run, c
    cdef Block block
    if job.plan.fetch_next and variant & STREAMING and together == channels:
        to_next = channels * job.problem.view.inner
    for b in range(b0, b1):
        block = block_at(job, b)
        for run in range(block.run, block.run + block.runs):
            for c in range(channels // together):
                write_adjacent_runs(job, a, &block, run, channel + c * together, together, to_next,
                                    variant)

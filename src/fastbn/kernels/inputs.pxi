# SPDX-License-Identifier: BSD-3-Clause
# What is summed, and what sums read: x and, but for moments, dy.
#
# May compute addresses; may not touch the elements.

cdef enum:
    # What is summed: bits of `terms` below, a constant, so that each combination becomes
    # loops of its own.
    MOMENTS = 0
    GRADIENTS = 1
    ACTIVATED = 2           # gradients, of which dy is taken back through an activation ...
    WEIGHTED = 4            # ... and multiplied by the weights of features
    MASKED = 8              # a run, of which counts what its mask says; the others add 0

cdef struct Inputs:
    # The same rows and columns of both. For moments, dy is x.
    Matrix x, dy
    Py_ssize_t first            # of the columns among those of the tile

cdef struct Run:
    # Neighbouring elements of a channel.
    const elem* x
    const elem* dy
    Features features
    Py_ssize_t length
    Py_ssize_t first            # of the channel's columns
    const signed char* mask     # of all of the run, its period, ...
    Py_ssize_t period
    Py_ssize_t at               # ... and where the elements are in it; NULL: all count


cdef inline const Operand* other_input(const Job* job, int terms) noexcept nogil:
    return &job.buffers.x if terms == MOMENTS else &job.buffers.dy


cdef inline Features input_features(const Job* job, const Block* block, int terms) noexcept nogil:
    # Those of a block whose terms have them.
    if terms != MOMENTS and job.problem.view.features:
        return features_from(job, block.offset)
    return no_features()


cdef inline Inputs long_inputs(const Job* job, const Block* block, Py_ssize_t channel,
                               Py_ssize_t run, Py_ssize_t first, int terms) noexcept nogil:
    return Inputs(long_matrix(job, &job.buffers.x, block, channel, run),
                  long_matrix(job, other_input(job, terms), block, channel, run), first)


cdef inline Inputs remainder_of(const Inputs* m, Py_ssize_t length) noexcept nogil:
    # Of matrices without gaps, out of `length` elements.
    return Inputs(remainder_matrix(m.x, length), remainder_matrix(m.dy, length), m.first)


cdef inline Inputs short_inputs(const Job* job, const Block* block, Py_ssize_t channel,
                                Py_ssize_t channels, Py_ssize_t first, int terms) noexcept nogil:
    return Inputs(short_matrix(job, &job.buffers.x, block, channel, channels),
                  short_matrix(job, other_input(job, terms), block, channel, channels), first)


cdef inline Py_ssize_t adjacent_inputs(const Job* job, Py_ssize_t channels,
                                       int terms) noexcept nogil:
    # How many channels have their columns side by side in both.
    return minimum(neighbours(job, &job.buffers.x, channels),
                   neighbours(job, other_input(job, terms), channels))

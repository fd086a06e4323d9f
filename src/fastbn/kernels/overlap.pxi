# SPDX-License-Identifier: BSD-3-Clause
"""Do two tensors of a job share memory? For C, what the view asks NumPy.

Two elements are at one place if the distance of the tensors is a sum of strides of the
one less a sum of strides of the other. Counted from the last elements of the other, all
that is subtracted is added: is a distance a sum of so many of these strides at most?

May not touch the elements. A part of drivers.pyx.
"""

cdef enum:
    AXES_OF_A_JOB = 5           # instances, the four of the view
    MOST_TRIES = 10_000         # then it is too hard to tell, and counts as an overlap

cdef struct Strides:
    # Of two operands, none twice, the longest first.
    int n
    Py_ssize_t stride[2 * AXES_OF_A_JOB]
    Py_ssize_t steps[2 * AXES_OF_A_JOB]         # at most
    Py_ssize_t reach[2 * AXES_OF_A_JOB + 1]     # of all from here on
    int tries


cdef void axes_of_operand(const Job* job, const Operand* operand, Py_ssize_t* shape,
                          Py_ssize_t* strides) noexcept nogil:
    shape[0], strides[0] = job.instances, operand.instance
    shape[1], strides[1] = job.view.outer, operand.outer
    shape[2], strides[2] = job.view.middle, operand.middle
    shape[3], strides[3] = job.view.channels, operand.channel
    shape[4], strides[4] = job.view.inner, 1


cdef void add_stride(Strides* s, Py_ssize_t stride, Py_ssize_t steps) noexcept nogil:
    cdef int i = s.n
    if stride == 0 or steps == 0:
        return
    while i > 0 and s.stride[i - 1] < stride:
        i -= 1
    if i > 0 and s.stride[i - 1] == stride:
        s.steps[i - 1] += steps
        return
    memmove(&s.stride[i + 1], &s.stride[i], (s.n - i) * sizeof(Py_ssize_t))
    memmove(&s.steps[i + 1], &s.steps[i], (s.n - i) * sizeof(Py_ssize_t))
    s.stride[i], s.steps[i] = stride, steps
    s.n += 1


cdef Py_ssize_t add_operand(Strides* s, const Job* job, const Operand* operand,
                            int sign) noexcept nogil:
    # Returns how far the element from which all strides are added is before the first one.
    cdef Py_ssize_t shape[AXES_OF_A_JOB]
    cdef Py_ssize_t strides[AXES_OF_A_JOB]
    cdef Py_ssize_t before = 0
    cdef int axis
    axes_of_operand(job, operand, shape, strides)
    for axis in range(AXES_OF_A_JOB):
        add_stride(s, magnitude(strides[axis]), shape[axis] - 1)
        if sign * strides[axis] < 0:
            before += magnitude(strides[axis]) * (shape[axis] - 1)
    return before


cdef bint is_sum(Strides* s, int first, Py_ssize_t distance) noexcept nogil:
    cdef Py_ssize_t i, most, rest = s.reach[first]
    s.tries -= 1
    if distance < 0 or distance > rest:
        return False
    if distance == 0 or distance == rest or s.tries < 0:
        return True
    rest = s.reach[first + 1]
    most = minimum(s.steps[first], distance // s.stride[first])
    for i in range(ceil_div(maximum(0, distance - rest), s.stride[first]), most + 1):
        if is_sum(s, first + 1, distance - i * s.stride[first]):
            return True
    return False


cdef bint overlap(const Job* job, size_t elem_size, const Operand* a,
                  const Operand* b) noexcept nogil:
    cdef Strides s
    cdef Py_ssize_t distance = (<char*>b.data - <char*>a.data) // <Py_ssize_t>elem_size
    cdef int i
    s.n, s.tries = 0, MOST_TRIES
    distance += add_operand(&s, job, a, 1) + add_operand(&s, job, b, -1)
    s.reach[s.n] = 0
    for i in range(s.n - 1, -1, -1):
        s.reach[i] = s.reach[i + 1] + s.steps[i] * s.stride[i]
    return is_sum(&s, 0, distance)


cdef bint same_places(const Job* job, const Operand* a, const Operand* b) noexcept nogil:
    cdef Py_ssize_t shape[AXES_OF_A_JOB]
    cdef Py_ssize_t a_strides[AXES_OF_A_JOB]
    cdef Py_ssize_t b_strides[AXES_OF_A_JOB]
    cdef int axis
    if a.data != b.data:
        return False
    axes_of_operand(job, a, shape, a_strides)
    axes_of_operand(job, b, shape, b_strides)
    for axis in range(AXES_OF_A_JOB):
        if shape[axis] > 1 and a_strides[axis] != b_strides[axis]:
            return False
    return True

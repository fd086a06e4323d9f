# SPDX-License-Identifier: BSD-3-Clause
# The columns of a tile: what they are read with, and their float64 sums; from channels to
# columns, and back.
#
# May: load, store and add the sums of columns. May not: read a tensor.

cdef enum:
    RUNNING_SUMS = 8        # that a channel's columns are added to, before they are added pairwise

cdef struct Columns:
    # What the columns of a tile are read with, and their sums.
    lanes aligned               # unused: the arrays begin where a register may
    real pow2_scale[COLUMNS + PADDING]
    real pivot[COLUMNS + PADDING]
    real scale[COLUMNS + PADDING]
    real shift[COLUMNS + PADDING]
    double s[COLUMNS + PADDING]
    double q[COLUMNS + PADDING]
    Activation activation

cdef struct WideSums:
    # The float64 sums of one register of columns.
    wides s[HALVES]
    wides q[HALVES]


cdef inline void load_columns(const Columns* columns, Py_ssize_t at, int terms,
                              RowGroup* g) noexcept nogil:
    # What a register of columns is read with.
    g.pivot = load_real(columns.pivot + at)
    if terms & GRADIENTS:
        g.pow2_scale = load_real(columns.pow2_scale + at)
    if terms & ACTIVATED:
        g.scale = load_real(columns.scale + at)
        g.shift = load_real(columns.shift + at)
        g.activation = &columns.activation


cdef inline void flush_to_f64(WideSums* sums, RealSums t) noexcept nogil:
    cdef int half
    for half in range(HALVES):
        sums.s[half] = sums.s[half] + widen(t.s, half)
        sums.q[half] = sums.q[half] + widen(t.q, half)


cdef inline void load_sums(const Columns* columns, Py_ssize_t at, WideSums* sums) noexcept nogil:
    cdef Py_ssize_t half
    for half in range(HALVES):
        sums.s[half] = load_wide(columns.s + at + half * WIDE)
        sums.q[half] = load_wide(columns.q + at + half * WIDE)


cdef inline void clear_columns(Columns* columns, Py_ssize_t n) noexcept nogil:
    memset(columns.s, 0, n * sizeof(double))
    memset(columns.q, 0, n * sizeof(double))


cdef inline void clear_sums(WideSums* sums) noexcept nogil:
    cdef int half
    for half in range(HALVES):
        sums.s[half] = sums.q[half] = widen(set1(0), half)


cdef inline void store_sums(const WideSums* sums, Py_ssize_t at, Columns* columns) noexcept nogil:
    cdef Py_ssize_t half
    for half in range(HALVES):
        store_wide(columns.s + at + half * WIDE, sums.s[half])
        store_wide(columns.q + at + half * WIDE, sums.q[half])


cdef inline void broadcast_columns(real* columns, const real* values, Py_ssize_t channels,
                                   Py_ssize_t width, Py_ssize_t length) noexcept nogil:
    # Repeats each channel's value over its columns, and the columns once more
    # from the start for registers that reach past `length`. A store may reach
    # past its channel, never past the padding; the next channel overwrites it.
    cdef Py_ssize_t c, j, n, filled = channels * width
    if width == 1:
        memcpy(columns, values, channels * sizeof(real))
    else:
        for c in range(channels):
            for j in range(ceil_div(width, WIDTH)):
                store_real(columns + c * width + j * WIDTH, set1(values[c]))
    while filled < length + PADDING:
        n = minimum(filled, length + PADDING - filled)
        memcpy(columns + filled, columns, n * sizeof(real))
        filled += n


cdef inline void broadcast_channels(const Job* job, real* columns, const real* values,
                                    Py_ssize_t channels) noexcept nogil:
    # Over the columns that sums are made in.
    cdef Py_ssize_t width = columns_per_channel(job)
    broadcast_columns(columns, values, channels, width, channels * width * job.plan.pixels)


cdef inline double reduce_row(const double* sums) noexcept nogil:
    # What `reduce_strided` does with RUN_COLUMNS neighbours.
    cdef wides lane[RUNNING_SUMS]
    cdef int k
    for k in range(RUNNING_SUMS // WIDE):
        lane[k] = load_wide(sums + k * WIDE) + load_wide(sums + RUNNING_SUMS + k * WIDE)
    return sum_of_eight(lane)


cdef inline double reduce_strided(const double* sums, Py_ssize_t n, Py_ssize_t step) noexcept nogil:
    # The sum of a channel's columns.
    cdef double lane[RUNNING_SUMS]
    cdef Py_ssize_t i, k, rounds = <size_t>n // RUNNING_SUMS
    for k in range(RUNNING_SUMS):
        lane[k] = 0.0
    for i in range(rounds):
        for k in range(RUNNING_SUMS):
            lane[k] += sums[(i * RUNNING_SUMS + k) * step]
    for k in range(n - rounds * RUNNING_SUMS):
        lane[k] += sums[(rounds * RUNNING_SUMS + k) * step]
    return (((lane[0] + lane[1]) + (lane[2] + lane[3]))
            + ((lane[4] + lane[5]) + (lane[6] + lane[7])))


cdef inline void reduce_columns(const Columns* columns, Py_ssize_t channels, Py_ssize_t width,
                                double* s, double* q) noexcept nogil:
    cdef Py_ssize_t c
    if width == 1:
        memcpy(s, columns.s, channels * sizeof(double))
        memcpy(q, columns.q, channels * sizeof(double))
        return
    if width == RUN_COLUMNS:
        for c in range(channels):
            s[c] = reduce_row(columns.s + c * RUN_COLUMNS)
            q[c] = reduce_row(columns.q + c * RUN_COLUMNS)
        return
    for c in range(channels):
        s[c] = reduce_strided(columns.s + c * width, width, 1)
        q[c] = reduce_strided(columns.q + c * width, width, 1)


cdef inline void reduce_channels(const Job* job, const Columns* columns, Py_ssize_t channels,
                                 double* s, double* q) noexcept nogil:
    # The reverse of broadcast_channels.
    cdef Py_ssize_t c
    if job.plan.pixels == 1:
        reduce_columns(columns, channels, columns_per_channel(job), s, q)
        return
    for c in range(channels):
        s[c] = reduce_strided(columns.s + c, PIXELS, channels)
        q[c] = reduce_strided(columns.q + c, PIXELS, channels)

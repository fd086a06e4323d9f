# SPDX-License-Identifier: BSD-3-Clause
"""What the engine tells the kernels of images: statistics of integers, conversions. Declarations
only.

Such a call is a nest of loops over axes, not a view: any strides of x, and of `out` or the
mask. Its last two axes are the rows and columns of panels, which a task has some of.
"""
from libc.stdint cimport int32_t, int64_t, uint64_t

cdef enum:
    MOST_AXES = 66          # of NumPy, and two that may have to be there
    PANEL = 4096            # elements that are gathered or scattered; of few bytes, more ...
    PANEL_BYTES = 8 * PANEL     # ... but at most these
    TABLE = 1024            # channels' coefficients are repeated up to here
    FULL_ROW = 64           # channels that are summed where they lie, if rows are apart
    NOTHING = -1 << 30      # in the place of an integer that is left out

ctypedef struct Nest:
    # Axes longer than 1, the rows and columns of panels last. Strides are in elements.
    int ndim
    int channel             # which of them; -1: there is one channel
    Py_ssize_t size[MOST_AXES]
    Py_ssize_t x[MOST_AXES]
    Py_ssize_t other[MOST_AXES]     # of `out`, or of the mask

ctypedef struct Image:
    Nest nest
    const char* x
    char* other             # NULL: there is no mask
    int dtype               # of fastbn.h
    int out_dtype
    Py_ssize_t channels
    Py_ssize_t first_channel    # that of the first of the axis, and ...
    Py_ssize_t channel_step     # ... 1, or where the axis is reversed, -1
    Py_ssize_t panel_rows, panel_columns    # at most
    Py_ssize_t row_panels, column_panels
    Py_ssize_t panels
    Py_ssize_t task_panels  # of a task
    # Statistics.
    bint marked             # one or three bytes a pixel and a byte of the mask, without gaps
    Py_ssize_t repeats      # elements that each stands for: where strides are 0
    const int32_t* nodata   # of each channel; NULL: nothing is left out
    void* totals            # of each worker and channel
    Py_ssize_t workers
    double* mean
    double* m2
    void* minimum
    void* maximum
    int64_t* sums           # (channels, 4): sums and sums of squares, 128 bits each ...
    int64_t* counts         # ... and what they are of; NULL: not wanted
    # Conversion.
    const double* norm_mean
    const double* norm_std
    double max_value
    bint conversion         # normalize or denormalize ...
    bint inverse            # ... this
    bint exact, split       # how it is computed
    bint streaming
    Py_ssize_t table        # channels in a table, repeated
    double* coefficients    # (kinds, table)
    float* splits           # (kinds, table)

# Tasks [begin, end).
ctypedef void (*ImageKernel)(const Image* image, Py_ssize_t begin, Py_ssize_t end,
                             int worker) noexcept nogil

ctypedef struct ImageKernels:
    size_t total_size
    Py_ssize_t coefficient_kinds, split_kinds
    ImageKernel begin_sums      # before the tasks of statistics: of workers
    ImageKernel add_sums
    ImageKernel merge_sums      # -> mean, m2, ...
    void (*fill_coefficients)(Image* image) noexcept nogil
    ImageKernel convert

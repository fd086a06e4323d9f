# SPDX-License-Identifier: BSD-3-Clause
"""Statistics of integers, and conversions of images, for one CPU level: all element types.

    runs.h          sums of neighbouring integers, in registers
    totals.h        those of all threads, and what they come to
    convert.h       runs of one type to runs of another
    turn.h          rows and columns exchanged
    panels.pxi      where rows and columns of elements lie
    sums.pxi        statistics
    convert.pxi     normalize, denormalize

A task has some panels of the nest of loops that an `Image` is (images.pxd).

May: arithmetic. May not: validate, allocate, start threads, know about layouts other than by
strides.
"""
from cpython.pycapsule cimport PyCapsule_New
from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint64_t
from libc.string cimport memset

from fastbn cimport (
    FASTBN_BFLOAT16, FASTBN_FLOAT16, FASTBN_FLOAT32, FASTBN_FLOAT64, FASTBN_INT8, FASTBN_UINT8,
    FASTBN_UINT16)
from fastbn.kernels.images cimport FULL_ROW, PANEL, PANEL_BYTES, TABLE, Image, ImageKernels, Nest

cdef extern from "environment.h" nogil:
    ctypedef int fp_state
    fp_state fp_enter()
    void fp_leave(fp_state saved)

cdef extern from "assertions.h" nogil:
    void assert_constant(bint condition)

cdef extern from "runs.h" nogil:
    enum:
        MOST_COLUMNS
        MOST_ROWS
        REGISTER_BYTES
        SPREAD_BYTES
    ctypedef struct Sums:
        pass
    Sums no_sums(int bits)
    void run8(const uint8_t* p, const uint8_t* keep, Py_ssize_t n, int flip, Sums* to)
    void run16(const uint16_t* p, const uint16_t* keep, Py_ssize_t n, int flip, Sums* to)
    void thirds8(const uint8_t* p, const uint8_t* keep, Py_ssize_t n, int flip, Sums* to)
    Py_ssize_t marked_run8(const uint8_t* p, const uint8_t* mask, Py_ssize_t n, int flip, Sums* to)
    Py_ssize_t marked_thirds8(const uint8_t* p, const uint8_t* mask, Py_ssize_t n, int flip,
                              Sums* to)
    void thirds16(const uint16_t* p, const uint16_t* keep, Py_ssize_t n, int flip, Sums* to)
    void columns8(const uint8_t* p, const uint8_t* keep, Py_ssize_t rows, Py_ssize_t columns,
                  Py_ssize_t step, int flip, Sums* to)
    void columns16(const uint16_t* p, const uint16_t* keep, Py_ssize_t rows, Py_ssize_t columns,
                   Py_ssize_t step, int flip, Sums* to)
    void spread_mask(const uint8_t* mask, Py_ssize_t step, Py_ssize_t n, Py_ssize_t width,
                     uint8_t* keep)
    Py_ssize_t count_marks(const uint8_t* keep, Py_ssize_t n, Py_ssize_t size)

cdef extern from "totals.h" nogil:
    ctypedef struct Total:
        Py_ssize_t count
    ctypedef struct Result:
        double mean
        double m2
        int64_t count
        int low
        int high
        int64_t sum
        int64_t more_sum
        uint64_t squares
        uint64_t more_squares
    Total no_total(int bits)
    void add_to_total(Total* to, const Sums* sums)
    void join_totals(Total* to, const Total* more)
    Result result_of(const Total* total, int offset, int64_t repeats)

cdef extern from "convert.h" nogil:
    ctypedef struct Split:
        float first
        float rest
        float shift
        int mean
    ctypedef void (*Unpack)(const void*, Py_ssize_t, double*) noexcept nogil
    ctypedef void (*Pack)(const double*, Py_ssize_t, void*) noexcept nogil
    ctypedef void (*SplitRun)(const void*, Py_ssize_t, Split, float*) noexcept nogil
    ctypedef void (*SplitRunToHalf)(const void*, Py_ssize_t, Split, uint16_t*) noexcept nogil
    ctypedef void (*SplitsRun)(const void*, Py_ssize_t, const float*, Py_ssize_t,
                               float*) noexcept nogil
    enum:
        CACHE_LINE
        CONVERSION_KINDS
        GATHERED
        PIECE
    ctypedef struct PieceMemory:
        char bytes[1]
    ctypedef struct PanelMemory:
        char bytes[1]
    const uint8_t* size_of_type
    const Unpack* unpack_as
    const Pack* pack_as
    const SplitRun* split_as
    const SplitRun* split_past_cache_as
    const SplitRunToHalf* split_to_float16_as
    const SplitRunToHalf* split_to_bfloat16_as
    const SplitsRun* splits_as
    void conversion_of(double mean, double std, double max_value, int inverse, double* k,
                       Py_ssize_t step)
    bint is_usual(const double* k, Py_ssize_t step)
    bint can_split(const double* k, Py_ssize_t step)
    Split split_of(const double* k, Py_ssize_t step)
    void floats_to_float16(const float* x, uint16_t* y, Py_ssize_t n)
    void floats_to_bfloat16(const float* x, uint16_t* y, Py_ssize_t n)
    void apply(double* x, Py_ssize_t n, const double* k, Py_ssize_t kinds, int by_channel,
               int exact)
    void copy_past_cache(char* to, const char* source, size_t size)
    void end_past_cache()
    void gather(int size, const void* x, Py_ssize_t rows, Py_ssize_t columns, Py_ssize_t row,
                Py_ssize_t column, void* to)
    void scatter(int size, void* x, Py_ssize_t rows, Py_ssize_t columns, Py_ssize_t row,
                 Py_ssize_t column, const void* source)

include "arithmetic.pxi"
include "panels.pxi"
include "sums.pxi"
include "convert.pxi"

cdef ImageKernels kernels


cdef const ImageKernels* filled_kernels() noexcept nogil:
    assert_constant(PIECE == TABLE)
    assert_constant(GATHERED == PANEL_BYTES)
    kernels.total_size = sizeof(Total)
    kernels.coefficient_kinds, kernels.split_kinds = CONVERSION_KINDS, SPLIT_KINDS
    kernels.begin_sums = begin_sums
    kernels.add_sums = add_sums
    kernels.merge_sums = merge_sums
    kernels.fill_coefficients = fill_coefficients
    kernels.convert = convert
    return &kernels


capsule = PyCapsule_New(<void*>filled_kernels(), "fastbn.kernels", NULL)

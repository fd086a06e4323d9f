# SPDX-License-Identifier: BSD-3-Clause
"""The arithmetic of fastbn, for one CPU level and one element type.

This one source is compiled once for each pair; simd.h gives it the registers.

1. A kernel is a serial function without Python: no allocation, no exception, no
   GIL. It gets a `Job` and the rectangle of the job that is its task.
2. A fragment uses the names of those before it only:

   arithmetic.pxi       whole numbers
   geometry.pxi         where the numbers of a task lie in memory
   activations.pxi      what follows a normalisation, and the gradient of it

   inputs.pxi           what is summed, and what sums read
   rowgroups.pxi        the terms of sums, and up to ROWS of them added
   columns.pxi          the columns of a tile and their float64 sums; channels <-> columns
   masks.pxi            copies of what is summed, without what does not count
   reduce_groups.pxi    row groups of a matrix to the sums of its columns
   reduce_rowwise.pxi   the same, row by row
   reduce_run.pxi       a long run to the sums of its channel
   reduce_float64.pxi   the same sums in float64
   reduce_block.pxi     a block to the sums of its channels

   coefficients.pxi     statistics -> what each pass multiplies and adds
   merging.pxi          forward statistics of parts -> those of the whole
   moments.pxi          forward statistics: the kernel
   gradients.pxi        backward statistics: the kernels
   extremes.pxi         the smallest and the largest numbers

   operands.pxi         the operands of an elementwise pass, one register of each
   tables.pxi           the coefficients of a register
   elementwise.pxi      the arithmetic of a register
   write_rows.pxi       passes with a table of coefficients: rows, planes of few values
   write_planes.pxi     passes along runs: planes
   write_features.pxi   passes along runs with parameters of their own: layer norm
   write_masked.pxi     what counts is written, and zeros elsewhere
   writes.pxi           which of these walks: the kernels

   vectors.pxi          vectors of parameters, to float64 and back
3. Sums are written in the order in which they are to be done, each column of
   its own. The compiler is forbidden to contract or reorder them: so the bits
   depend neither on the width of the registers nor on the CPU.
4. Every public kernel sets the standard floating-point environment and restores
   the caller's.

May: arithmetic. May not: validate, allocate, start threads, know about layouts
other than by the strides of its operands.
"""
from cpython.pycapsule cimport PyCapsule_New
from libc.float cimport DBL_MAX
from libc.math cimport INFINITY, fabs, sqrt
from libc.stddef cimport ptrdiff_t
from libc.stdint cimport uint64_t
from libc.string cimport memcpy, memset

from fastbn cimport (
    FASTBN_HARDSIGMOID, FASTBN_HARDSWISH, FASTBN_IDENTITY, FASTBN_LEAKY_RELU, FASTBN_RELU,
    FASTBN_RELU6, FASTBN_SILU)
from fastbn.kernels.problem cimport (
    COEFFICIENT_KINDS, COLUMNS, MAX_WIDTH, OFFSET, PIVOT, PIXELS, POW2_SCALE, PROBES, RUN_COLUMNS,
    SCALE, SHIFT, SLOPE, WRAP, ActivationTraits, BlockMask, Buffers, Job, KernelTable, Mask,
    MASK_PADDING, Operand, TileKernel, View, WrittenMask)

cdef extern from "environment.h" nogil:
    ctypedef int fp_state
    fp_state fp_enter()
    void fp_leave(fp_state saved)

cdef extern from "simd.h" nogil:
    # Cython sees numbers; the C compiler sees numbers and registers of them.
    ctypedef float elem
    ctypedef float real
    ctypedef float lanes
    ctypedef double wides
    enum:
        WIDTH
        WIDE
        HALVES
        LINE
        PAGE
        MAX_ROW_VECTORS
        FAR
        TERMS
        ROUNDED_ONCE
    double SMALLEST_SQUARE
    double LARGEST_SCALE
    double USUAL_SCALE
    real LOG2_E
    real LOG_2
    real REST_OF_LOG_2
    const real* POLYNOMIAL
    void assert_constant(bint condition)
    lanes load(const elem* p)
    lanes load_real(const real* p)
    lanes load_real_n(const real* p, ptrdiff_t n)
    lanes load_n_or(const elem* p, ptrdiff_t n, lanes fill)
    void store(elem* p, lanes v)
    void store_real(real* p, lanes v)
    void store_n(elem* p, lanes v, ptrdiff_t n)
    void stream(elem* p, lanes v)
    void flush_stream()
    void prefetch(const elem* p, ptrdiff_t distance)
    ptrdiff_t to_alignment(const elem* p)
    ptrdiff_t to_line(const elem* p)
    lanes set1(real x)
    lanes add(lanes a, lanes b)
    lanes force_register(lanes v)
    double as_double(elem x)
    real first_lane(lanes v)
    real as_real(double x)
    wides load_wide(const double* p)
    void store_wide(double* p, wides v)
    wides widen(lanes v, int half)
    double sum_of_eight(const wides* v)
    lanes blend_at(lanes first, lanes other, ptrdiff_t n)
    lanes neg_abs(lanes v)
    lanes call_noinline(lanes (*f)(const void*, lanes, lanes) noexcept nogil,
                        const void* context, lanes v, lanes w)
    lanes min_lanes(lanes a, lanes b)
    lanes max_lanes(lanes a, lanes b)
    lanes select_le(lanes a, lanes b, lanes one, lanes other)
    lanes all_bits()
    lanes no_bits()
    lanes and_bits(lanes v, lanes bits)
    lanes mask_bits(const signed char* mask)
    void fill_mask(signed char* to, signed char value, ptrdiff_t n)
    lanes select_bits(lanes bits, lanes one, lanes other)
    lanes round_to_int(lanes v)
    lanes scale_by_pow2(lanes v, lanes n)
    double inverse_pow2(double size)

cdef enum:
    PADDING = MAX_WIDTH     # the widest register reads this far past the columns

include "arithmetic.pxi"
include "geometry.pxi"
include "activations.pxi"
include "inputs.pxi"
include "rowgroups.pxi"
include "columns.pxi"
include "reduce_groups.pxi"
include "masks.pxi"
include "reduce_rowwise.pxi"
include "reduce_run.pxi"
include "reduce_float64.pxi"
include "reduce_block.pxi"
include "coefficients.pxi"
include "merging.pxi"
include "moments.pxi"
include "gradients.pxi"
include "extremes.pxi"
include "operands.pxi"
include "tables.pxi"
include "elementwise.pxi"
include "write_rows.pxi"
include "write_planes.pxi"
include "write_features.pxi"
include "write_masked.pxi"
include "writes.pxi"
include "vectors.pxi"

cdef KernelTable kernels


cdef inline void assert_widths() noexcept nogil:
    # What the compiler checks: the widths that other widths are made of.
    assert_constant(MAX_WIDTH % WIDTH == 0)
    assert_constant(HALVES * WIDE == WIDTH)
    assert_constant(LINE % WIDTH == 0)
    assert_constant(COLUMNS % RUN_COLUMNS == 0)
    assert_constant(FEATURE_CHUNK % LINE == 0)
    assert_constant(IN_L1 % (ROWS * RUN_COLUMNS) == 0)
    assert_constant(RUN_COLUMNS == 2 * RUNNING_SUMS)
    assert_constant(MAX_ROW_VECTORS <= ROW_VECTORS)


cdef const KernelTable* filled_table() noexcept nogil:
    assert_widths()
    kernels.elem_size = sizeof(elem)
    kernels.real_size = sizeof(real)
    kernels.activation_count = ACTIVATIONS
    kernels.activations = filled_traits()
    kernels.moments = moments
    kernels.merge_moments = merge_moments
    kernels.extremes = extremes
    kernels.merge_extremes = merge_extremes
    kernels.update_running = update_running
    kernels.coefficients = coefficients
    kernels.write_forward = write_forward
    kernels.gradient_sums = gradient_sums
    kernels.merge_gradients = merge_gradients
    kernels.batch_coefficients = batch_coefficients
    kernels.write_gradient = write_gradient
    kernels.write_dz = write_dz
    kernels.broadcast_groups = broadcast_groups
    kernels.broadcast_features = broadcast_features
    kernels.add_instances = add_instances
    kernels.to_float64 = vector_to_float64
    kernels.from_float64 = vector_from_float64
    return &kernels


capsule = PyCapsule_New(<void*>filled_table(), "fastbn.kernels", NULL)

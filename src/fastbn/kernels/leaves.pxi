# SPDX-License-Identifier: BSD-3-Clause
"""The arithmetic of fastbn, for one CPU level and one element type.

This one source is compiled once for each pair; lanes.h gives it the registers.

1. A leaf is a serial function without Python: no allocation, no exception, no
   GIL. It gets a `Job` and the rectangle of the job that is its task.
2. geometry.pxi   where the numbers of a task lie in memory
   sums.pxi       the two sums that every statistic is made of
   moments.pxi    forward statistics: blocks, and their merge
   activations.pxi  what follows a normalisation, and the gradient of it
   gradients.pxi  backward statistics, and every coefficient
   pens.pxi       the arithmetic of the elementwise passes
   writes.pxi     these passes, over planes and rows
   features.pxi   the same where features have parameters
   vectors.pxi    vectors of parameters, to float64 and back
3. Sums are written in the order in which they are to be done, each column of
   its own. The compiler is forbidden to contract or reorder them: so the bits
   depend neither on the width of the registers nor on the CPU.
4. Every public leaf sets the standard floating-point environment and restores
   the caller's.

May: arithmetic. May not: validate, allocate, start threads, know about layouts
other than by the strides of its operands.
"""
from cpython.pycapsule cimport PyCapsule_New
from libc.math cimport sqrt
from libc.stddef cimport ptrdiff_t
from libc.stdint cimport uint64_t
from libc.string cimport memcpy, memset

from fastbn.kernels.job cimport (
    COEFFICIENTS, COLUMNS, GAIN, LEAKY_RELU, OFFSET, PIVOT, PIXELS, RELU, RELU6, RUN_COLUMNS, SCALE,
    SHIFT, SILU, SLOPE, WRAP, Job, Leaves, Operand)

cdef extern from "environment.h" nogil:
    ctypedef int fp_state
    fp_state fp_enter()
    void fp_leave(fp_state saved)

cdef extern from "lanes.h" nogil:
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
        MOST_ABREAST
        FAR
        TERMS
        ROUNDED_ONCE
    double SMALLEST_SQUARE
    double LARGEST_SCALE
    double USUAL_SCALE
    real LOG2_E
    real LOG_2
    real REST_OF_LOG_2
    const real POLYNOMIAL[12]
    lanes load(const elem* p)
    lanes load_real(const real* p)
    lanes load_real_part(const real* p, ptrdiff_t n)
    lanes load_part(const elem* p, ptrdiff_t n, lanes fill)
    void store(elem* p, lanes v)
    void store_real(real* p, lanes v)
    void store_part(elem* p, lanes v, ptrdiff_t n)
    void stream(elem* p, lanes v)
    void stream_end()
    void prefetch(const elem* p, ptrdiff_t ahead)
    ptrdiff_t to_alignment(const elem* p)
    ptrdiff_t to_line(const elem* p)
    lanes splat(real x)
    lanes plus(lanes a, lanes b)
    lanes held(lanes v)
    double as_double(elem x)
    real first_lane(lanes v)
    real as_real(double x)
    wides load_wide(const double* p)
    void store_wide(double* p, wides v)
    wides widen(lanes v, int half)
    double tree_of_eight(const wides* v)
    lanes join(lanes first, lanes other, ptrdiff_t n)
    lanes negative(lanes v)
    lanes apart(lanes (*f)(lanes) noexcept nogil, lanes v)
    lanes smaller(lanes a, lanes b)
    lanes larger(lanes a, lanes b)
    lanes if_at_most(lanes a, lanes b, lanes one, lanes other)
    lanes all_bits()
    lanes no_bits()
    lanes masked(lanes v, lanes bits)
    lanes rounded(lanes v)
    lanes times_power_of_two(lanes v, lanes n)
    double inverse_power_of_two(double scale)

cdef enum:
    PADDING = 16        # the widest register reads this far past the columns

include "geometry.pxi"
include "activations.pxi"
include "sums.pxi"
include "moments.pxi"
include "gradients.pxi"
include "pens.pxi"
include "features.pxi"
include "writes.pxi"
include "vectors.pxi"

cdef Leaves leaves


cdef const Leaves* filled_leaves() noexcept nogil:
    leaves.elem_size = sizeof(elem)
    leaves.real_size = sizeof(real)
    leaves.moments = moments
    leaves.merge_moments = merge_moments
    leaves.update_running = update_running
    leaves.coefficients = coefficients
    leaves.write_forward = write_forward
    leaves.gradient_sums = gradient_sums
    leaves.merge_gradients = merge_gradients
    leaves.write_gradient = write_gradient
    leaves.write_dz = write_dz
    leaves.spread_groups = spread_groups
    leaves.spread_features = spread_features
    leaves.add_samples = add_samples
    leaves.widen = widen_vector
    leaves.narrow = narrow_vector
    return &leaves


capsule = PyCapsule_New(<void*>filled_leaves(), "fastbn.leaves", NULL)

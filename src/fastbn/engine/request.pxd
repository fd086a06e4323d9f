# SPDX-License-Identifier: BSD-3-Clause
"""What a call comes to, and what can be wrong with it. Declarations only."""
from fastbn cimport fastbn_call, fastbn_tensor
from libc.stdint cimport int32_t, int64_t

from fastbn.kernels.images cimport Image
from fastbn.kernels.problem cimport Job, KernelTable

cdef enum:
    MAX_DIMENSIONS = 64     # NumPy's own limit
    NO_AXIS = -1

cdef enum:      # what `run` returns, beside codes of fastbn.h
    NO_MEMORY = -1
    INTERRUPTED = -2

cdef enum:      # arguments that can be wrong; tensors and vectors come last
    ARG_NONE
    ARG_CALL
    ARG_ACTIVATION
    ARG_DTYPE
    ARG_VECTOR_DTYPE
    ARG_SHAPE
    ARG_AXIS
    ARG_GROUPS
    ARG_EPS
    ARG_MOMENTUM
    ARG_NEGATIVE_SLOPE
    ARG_OUT_DTYPE
    ARG_MAX_VALUE
    ARG_NORM_MEAN
    ARG_NORM_STD
    ARG_WORKERS
    ARG_X
    ARG_DY
    ARG_RESIDUAL
    ARG_OUT
    ARG_DRESIDUAL
    ARG_WEIGHT
    ARG_BIAS
    ARG_MASK
    ARG_LENGTHS
    ARG_RUNNING_MEAN
    ARG_RUNNING_VAR
    ARG_MEAN
    ARG_INVSTD
    ARG_M2
    ARGUMENTS

ctypedef struct Fault:
    int code                # of fastbn.h
    int argument
    int other          # that it does not go with; itself: its elements overlap each other

ctypedef struct Axes:
    # Those of one tensor. Strides are in bytes, or in elements, which `unit` then says.
    int ndim
    const Py_ssize_t* shape
    const Py_ssize_t* strides
    Py_ssize_t unit         # the stride of neighbours

ctypedef struct Memory:
    # Where the elements of an argument are. Data NULL: where the call says.
    const char* data
    Axes axes
    Py_ssize_t itemsize     # in bytes

ctypedef struct Order:
    # The axes of x in the order of memory, but instances first, and features last.
    int axes[MAX_DIMENSIONS]
    int n
    bint instances      # axes[0] counts instances, each with its own statistics
    int outer           # axes[instances:outer] are outer, axes[outer + has_channel:] inner
    bint has_channel    # False: there is one channel, and its axis has no place

ctypedef struct Extras:
    # Of bindings, beside a call. All 0: nothing.
    bint new_outputs            # out and dresidual are apart from everything
    const Memory* memory        # (ARGUMENTS,) arrays that copies stand for in the call
    bint inverted               # backward: x is the y of an activation that has an inverse
    void* coefficients          # inference: prepared ones, in the place of vectors
    int (*interrupted)() noexcept nogil     # asked now and then: not 0 ends the call early
    # Statistics of integers, of each channel: what is left out; the sums, and of how many.
    const int32_t* nodata
    int64_t* sums
    int64_t* counts
    bint part                   # batch norm: of the batch, others have the rest; `run_own`
    size_t whole                # bytes of what x is a slice of: the cache has room for it, or not

ctypedef struct Request:
    # What a call comes to.
    fastbn_call call            # as far as this version knows it
    Extras extras
    Fault fault
    const KernelTable* kernels
    Order order
    Job job
    Job group_job               # whose channels are groups of channels; without buffers
    Image image                 # in the place of a job: statistics of integers, conversions
    Py_ssize_t parameters       # of weight and bias, how many numbers
    Py_ssize_t groups           # that have statistics of their own: in an instance ...
    Py_ssize_t owners           # ... and in all of them
    bint empty
    bint nothing                # a mask leaves no value: as if it were empty, but for zeros
    Py_ssize_t counted          # positions that a mask leaves, of all instances
    int workers
    # Workspace: a part of `worker_size` bytes for each worker that takes instances.
    char* workspace
    size_t worker_size
    void* shares                # what threads keep count in
    void* memory                # of `run`
    double loss                 # seconds that threads cost more than they gave

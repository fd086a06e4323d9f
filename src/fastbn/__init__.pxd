# SPDX-License-Identifier: BSD-3-Clause
"""fastbn for Cython: `cimport fastbn`, with `fastbn.get_include()` among include_dirs.

fastbn.h, which this repeats, has the explanations. Declarations only.
"""
from libc.stdint cimport int32_t, int64_t

cdef extern from "fastbn.h" nogil:
    enum:
        FASTBN_ABI

    enum fastbn_norm:
        FASTBN_BATCH_NORM
        FASTBN_INSTANCE_NORM
        FASTBN_GROUP_NORM
        FASTBN_LAYER_NORM
        FASTBN_RMS_NORM

    enum fastbn_operation:
        FASTBN_STATISTICS
        FASTBN_INFERENCE
        FASTBN_FORWARD
        FASTBN_BACKWARD
        FASTBN_BACKWARD_INFERENCE
        FASTBN_NORMALIZE
        FASTBN_DENORMALIZE

    enum fastbn_dtype:
        FASTBN_FLOAT32
        FASTBN_FLOAT64
        FASTBN_FLOAT16
        FASTBN_BFLOAT16
        FASTBN_UINT8
        FASTBN_INT8
        FASTBN_UINT16
        FASTBN_INT16

    enum fastbn_activation:
        FASTBN_IDENTITY
        FASTBN_RELU
        FASTBN_LEAKY_RELU
        FASTBN_SILU
        FASTBN_RELU6
        FASTBN_HARDSWISH
        FASTBN_HARDSIGMOID

    enum fastbn_error:
        FASTBN_OK
        FASTBN_UNKNOWN_FIELD
        FASTBN_NULL_POINTER
        FASTBN_BAD_OPERATION
        FASTBN_BAD_DTYPE
        FASTBN_BAD_SHAPE
        FASTBN_BAD_AXIS
        FASTBN_BAD_GROUPS
        FASTBN_BAD_NUMBER
        FASTBN_ONE_VALUE
        FASTBN_BAD_STRIDES
        FASTBN_MISALIGNED
        FASTBN_BAD_WORKERS
        FASTBN_BAD_WORKSPACE
        FASTBN_BAD_TASK
        FASTBN_OVERLAP
        FASTBN_BAD_MASK

    ctypedef struct fastbn_tensor:
        void* data
        const Py_ssize_t* strides

    ctypedef struct fastbn_call:
        size_t struct_size
        int32_t norm
        int32_t operation
        int32_t dtype
        int32_t vector_dtype
        int32_t ndim
        int32_t channel_axis
        int32_t sample_axis
        int32_t normalized_ndim
        const Py_ssize_t* shape
        Py_ssize_t groups
        double eps
        double momentum
        fastbn_tensor x
        fastbn_tensor dy
        fastbn_tensor out
        const void* weight
        const void* bias
        void* running_mean
        void* running_var
        void* dweight
        void* dbias
        double* mean
        double* invstd
        double* m2
        int32_t activation
        int32_t reserved
        double negative_slope
        fastbn_tensor residual
        fastbn_tensor dresidual
        int32_t out_dtype
        int32_t reserved2
        double max_value
        const double* norm_mean
        const double* norm_std
        void* minimum
        void* maximum
        fastbn_tensor mask
        const int64_t* lengths
        int32_t length_axis
        int32_t padding

    ctypedef struct fastbn_api:
        size_t struct_size
        int32_t abi
        const char* version
        const char* (*error_message)(int code) noexcept nogil
        int (*workspace_size)(const fastbn_call* call, int workers, size_t* size) noexcept nogil
        int (*run)(const fastbn_call* call, int threads, void* workspace,
                   size_t size) noexcept nogil
        int (*begin)(const fastbn_call* call, int workers, void* workspace,
                     size_t size) noexcept nogil
        int (*phases)(const void* workspace) noexcept nogil
        Py_ssize_t (*tasks)(const void* workspace, int phase) noexcept nogil
        int (*run_tasks)(const void* workspace, int phase, Py_ssize_t begin, Py_ssize_t end,
                         int worker) noexcept nogil
        int (*finish)(void* workspace) noexcept nogil

cdef extern from *:
    # The header has it for extension modules, to which Cython's are.
    const fastbn_api* fastbn_import() except NULL

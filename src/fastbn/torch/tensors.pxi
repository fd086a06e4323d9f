# SPDX-License-Identifier: BSD-3-Clause
# Tensors -> pointers, sizes and strides, in a tenth of a microsecond. PyTorch's own
# `Tensor.numpy()` takes as long as a small call computes, refuses a tensor that requires a
# gradient, and knows no bfloat16. DLPack has a table of C functions for the purpose
# (`__dlpack_c_exchange_api__`); its types are declared here, so that the build needs no
# PyTorch. May describe memory, which a tensor owns; may not read it. A part of _direct.pyx.

cdef enum:
    CPU = 1             # DLPack's kDLCPU
    REAL = 2            # kDLFloat
    BRAIN = 4           # kDLBfloat
    VERSION = 1         # of DLPack; another one may mean other types

# The beginning of DLPack's types, as far as it is used.
ctypedef struct Description:
    char* data
    int32_t device, device_number
    int32_t ndim
    uint8_t code, bits
    uint16_t lanes
    const int64_t* shape
    const int64_t* strides
    uint64_t offset

ctypedef struct Table:
    uint32_t major, minor
    void* older
    void* allocate
    void* take
    void* give
    int (*describe)(void* tensor, Description* description) except -1

cdef const Table* table_of(tensor) except NULL:
    cdef object capsule = tensor.__dlpack_c_exchange_api__
    cdef const Table* found = <const Table*>PyCapsule_GetPointer(capsule, "dlpack_exchange_api")
    if found.major != VERSION:
        raise ImportError(f"fastbn.torch knows version {VERSION} of DLPack, PyTorch has "
                          f"version {found.major}")
    return found


cdef const Table* table = table_of(Tensor)


cdef inline bint is_ordinary(tensor):
    # Neither a subclass nor the imaginary part of a conjugate, whose memory has the other sign.
    cdef object kind = type(tensor)
    return (kind is Tensor or kind is Parameter) and not tensor.is_neg()


cdef int describe(tensor, Description* d) except -1:
    if not is_ordinary(tensor):
        raise RefusedError
    try:
        table.describe(<void*>tensor, d)
    except RuntimeError:    # a batch of tensors, for example
        raise RefusedError from None
    if d.device != CPU or d.lanes != 1:
        raise RefusedError
    return 0


cdef inline int dtype_of(const Description* d) noexcept:
    # That of fastbn.h; 0: none.
    if d.code == REAL and d.bits == 32:
        return FASTBN_FLOAT32
    if d.code == REAL and d.bits == 64:
        return FASTBN_FLOAT64
    if d.code == REAL and d.bits == 16:
        return FASTBN_FLOAT16
    return FASTBN_BFLOAT16 if d.code == BRAIN and d.bits == 16 else 0


cdef bint gapless(const Description* d, bint channels_last) noexcept:
    # In that order, without a doubt: no stride of an axis of length 1 that is odd; and of
    # channels_last, no size of 1 that leaves it open which order it is.
    cdef int64_t step = 1
    cdef int i, axis
    if channels_last and not 4 <= d.ndim <= 5:
        return False
    for i in range(d.ndim):
        axis = d.ndim - 1 - i
        if channels_last and axis > 0:
            axis = 1 if i == 0 else axis + 1
        if d.strides[axis] != step or (channels_last and d.shape[axis] == 1):
            return False
        step *= d.shape[axis]
    return True

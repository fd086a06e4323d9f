# SPDX-License-Identifier: BSD-3-Clause
# Tensors -> arrays over the same memory, in a tenth of a microsecond. PyTorch's own
# `Tensor.numpy()` takes as long as a small call computes, refuses a tensor that requires a
# gradient, and knows no bfloat16. DLPack has a table of C functions for the purpose
# (`__dlpack_c_exchange_api__`); its types are declared here, so that the build needs no
# PyTorch. May describe memory as an array that keeps its tensor alive; may not copy. A
# part of _direct.pyx.

cdef extern from "numpy/arrayobject.h":
    cnp.ndarray PyArray_NewFromDescr(
        type subtype, cnp.dtype descr, int n, cnp.npy_intp* dimensions, cnp.npy_intp* strides,
        void* data, int flags, object obj)

cdef enum:
    CPU = 1             # DLPack's kDLCPU
    REAL = 2            # kDLFloat
    BRAIN = 4           # kDLBfloat
    VERSION = 1         # of DLPack; another one may mean other types
    MAX_DIMENSIONS = 64

# The beginning of DLPack's types, as far as it is used.
ctypedef struct Description:
    char* data
    int32_t device, device_number
    int32_t ndim
    uint8_t code, bits
    uint16_t lanes
    int64_t* shape
    int64_t* strides
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
cdef object float16 = np.dtype(np.float16)
cdef object float32 = np.dtype(np.float32)
cdef object float64 = np.dtype(np.float64)
cdef object bfloat16 = None     # ml_dtypes is imported when the first one comes


cdef object brain_type():
    global bfloat16
    if bfloat16 is None:
        try:
            import ml_dtypes
        except ImportError:
            raise ImportError("bfloat16 tensors need ml_dtypes: "
                              "python -m pip install ml_dtypes") from None
        bfloat16 = np.dtype(ml_dtypes.bfloat16)
    return bfloat16


cdef object type_of(const Description* t):
    if t.lanes == 1 and t.code == REAL and t.bits == 32:
        return float32
    if t.lanes == 1 and t.code == REAL and t.bits == 64:
        return float64
    if t.lanes == 1 and t.code == REAL and t.bits == 16:
        return float16
    if t.lanes == 1 and t.code == BRAIN and t.bits == 16:
        return brain_type()
    return None


cpdef array(tensor):
    """Return an array over the memory of a tensor on the CPU; None for None."""
    if tensor is None:
        return None
    if tensor.is_neg():     # the imaginary part of a conjugate: its memory has the other sign
        tensor = tensor.resolve_neg()
    cdef Description t
    cdef cnp.npy_intp[MAX_DIMENSIONS] strides
    cdef Py_ssize_t size
    cdef int axis
    cdef cnp.ndarray made
    table.describe(<void*>tensor, &t)
    dtype = type_of(&t)
    if dtype is None:
        raise TypeError("expected a tensor of float32, float64, float16 or bfloat16, "
                        f"got {tensor.dtype}")
    if t.device != CPU or t.ndim > MAX_DIMENSIONS or (t.data == NULL and tensor.numel()):
        raise ValueError(f"expected a tensor in memory on the CPU, got one of shape "
                         f"{tuple(tensor.shape)} on {tensor.device}")
    size = t.bits // 8
    for axis in range(t.ndim):
        strides[axis] = t.strides[axis] * size
    Py_INCREF(dtype)    # the next call takes it
    made = PyArray_NewFromDescr(cnp.ndarray, dtype, t.ndim, <cnp.npy_intp*>t.shape, strides,
                                t.data + t.offset, cnp.NPY_ARRAY_WRITEABLE, None)
    cnp.set_array_base(made, tensor)
    cnp.PyArray_UpdateFlags(made, cnp.NPY_ARRAY_C_CONTIGUOUS | cnp.NPY_ARRAY_F_CONTIGUOUS
                            | cnp.NPY_ARRAY_ALIGNED)
    return made

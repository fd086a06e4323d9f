# SPDX-License-Identifier: BSD-3-Clause
# cython: language_level=3, boundscheck=False, wraparound=False
"""Kernels for operators of PyTorch: norms, forward and backward, on the CPU.

They are registered through PyTorch's stable C interface, whose functions `look_up` finds in
the process: the build needs nothing of PyTorch. A kernel gets a stack of 64-bit values, owns
them, and leaves its results in their place. What fastbn does not take, PyTorch's own kernel
gets: operators of the namespace `fastbn_pytorch`, which dispatch.py defines, call it.

    here                tensors and vectors of PyTorch, saved statistics, a call; the table
    batch_norm.pxi      the operators of batch norm
    instances.pxi       those of layer and group norm, whose instances have statistics

May: compute without the GIL, on as many threads as PyTorch has. May not: raise an error of
its own; what PyTorch's own kernel raised is thrown again, in kind and words.
"""
from libc.math cimport sqrt
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy, memset, strlen

from fastbn cimport *
from fastbn.engine cimport core
from fastbn.engine.request cimport Extras, Request

from fastbn import _forks

ctypedef uint64_t Value     # a tensor, a number, or a pointer to a Value: one that may be None
ctypedef void* Tensor
ctypedef void (*Kernel)(Value*, uint64_t, uint64_t) noexcept nogil
ctypedef int32_t (*Constant)() noexcept nogil
ctypedef int (*Deleter)(Value*) noexcept nogil

cdef extern from "_threads.h" nogil:
    bint forked()
    void notice_forks(bint forked_before)

cdef extern from "_throw.h" nogil:
    const char* CANNOT_CALL
    int failed()
    void keep_failure(int kind, const char* text, size_t length)
    void throw_failure()
    void set_thrower(int kind, void* constructor, void* typeinfo)
    void set_allocator(void* allocate, void* throw_, void* check)

cdef enum:
    PARALLEL_FROM = 512 << 10   # bytes of work, as in _threads.pyx
    MOST_AXES = 16
    MOST_OUTPUTS = 4

# Stands behind float64 statistics that follow rounded ones.
cdef uint64_t MARK = 0x6661737462

# ---- PyTorch's functions -------------------------------------------------------------

cdef struct Functions:
    int (*get_dim)(Tensor, int64_t*) noexcept nogil
    int (*get_sizes)(Tensor, int64_t**) noexcept nogil
    int (*get_strides)(Tensor, int64_t**) noexcept nogil
    int (*get_dtype)(Tensor, int32_t*) noexcept nogil
    int (*get_layout)(Tensor, int32_t*) noexcept nogil
    int (*get_device_type)(Tensor, int32_t*) noexcept nogil
    int (*get_storage_size)(Tensor, int64_t*) noexcept nogil
    int (*get_storage_offset)(Tensor, int64_t*) noexcept nogil
    int (*data)(Tensor, void**) noexcept nogil
    int (*empty)(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t,
                 Tensor*) noexcept nogil
    int (*view)(Tensor, int64_t, const int64_t*, const int64_t*, int64_t, Tensor*) noexcept nogil
    int (*copy)(Tensor, Tensor, int32_t) noexcept nogil
    int (*undefined)(Tensor*) noexcept nogil
    int (*is_defined)(Tensor, unsigned char*) noexcept nogil
    int (*delete)(Tensor) noexcept nogil
    int (*list_item)(void*, size_t, Value*) noexcept nogil
    int (*list_size)(void*, size_t*) noexcept nogil
    int (*delete_list)(void*) noexcept nogil
    int (*call)(const char*, const char*, Value*, uint64_t) noexcept nogil
    int (*threads)(uint32_t*) noexcept nogil
    int (*new_library)(const char*, const char*, const char*, uint32_t, void**) noexcept nogil
    int (*add_kernel)(void*, const char*, Kernel, uint64_t) noexcept nogil
    int (*delete_library)(void*) noexcept nogil

#: In the order of `Functions`.
NAMES = (
    "aoti_torch_get_dim", "aoti_torch_get_sizes", "aoti_torch_get_strides",
    "aoti_torch_get_dtype", "aoti_torch_get_layout", "aoti_torch_get_device_type",
    "aoti_torch_get_storage_size", "aoti_torch_get_storage_offset",
    "torch_get_mutable_data_ptr", "aoti_torch_empty_strided", "aoti_torch__reinterpret_tensor",
    "aoti_torch_copy_", "aoti_torch_new_uninitialized_tensor", "aoti_torch_is_defined",
    "aoti_torch_delete_tensor_object",
    "torch_list_get_item", "torch_list_size", "torch_delete_list", "torch_call_dispatcher",
    "torch_get_num_threads", "aoti_torch_library_init_impl", "torch_library_impl",
    "aoti_torch_delete_library_object")

#: Functions without arguments, that return what PyTorch calls its types, layout and device.
CONSTANTS = (
    "aoti_torch_dtype_float32", "aoti_torch_dtype_float64", "aoti_torch_dtype_float16",
    "aoti_torch_dtype_bfloat16", "aoti_torch_dtype_uint8", "aoti_torch_layout_strided",
    "aoti_torch_device_type_cpu")

cdef Functions torch
cdef bint on = False        # else all goes to PyTorch's own kernels
cdef int32_t[5] dtypes      # by the numbers of fastbn.h less 1; then uint8
cdef int32_t strided, cpu
cdef uint64_t abi = (<uint64_t>2 << 56) | (<uint64_t>10 << 48)    # of PyTorch 2.10
cdef Deleter delete_value = NULL


def look_up(addresses, constants, deleter, throwers, allocators):
    """Take the addresses of PyTorch's functions, in the order of `NAMES` and `CONSTANTS`."""
    global strided, cpu, delete_value
    cdef void** to = <void**>&torch
    for i, address in enumerate(addresses):
        to[i] = <void*><uintptr_t>address
    numbers = [(<Constant><uintptr_t>address)() for address in constants]
    for i in range(5):
        dtypes[i] = numbers[i]
    strided, cpu = numbers[5], numbers[6]
    delete_value = <Deleter><uintptr_t>deleter
    for kind, (constructor, typeinfo) in enumerate(throwers):
        set_thrower(kind, <void*><uintptr_t>constructor, <void*><uintptr_t>typeinfo)
    allocate, throw_, check = allocators
    set_allocator(<void*><uintptr_t>allocate, <void*><uintptr_t>throw_, <void*><uintptr_t>check)


cdef class OwnKernel:
    """PyTorch's own kernel, as an operator in Python; what it raises is kept for `pass_on`.

    Compiled, since handlers of signals run in Python's own functions: what one raised there
    would end in C. So it waits for the caller's.
    """
    cdef object kernel
    cdef tuple kinds, blank

    def __init__(self, kernel, tuple kinds, tuple blank):
        # Errors of the first kind are the rest; `blank` is returned beside an error.
        self.kernel, self.kinds, self.blank = kernel, kinds, blank

    def __call__(self, keyset, *arguments):
        try:
            return self.kernel.call_boxed(keyset, *arguments)
        except Exception as error:
            words = str(error).encode()
            kind = self.kinds.index(type(error)) if type(error) in self.kinds else 0
            keep_failure(kind, words, len(words))
            return self.blank


# ---- tensors ---------------------------------------------------------------------------

cdef struct Description:
    Tensor tensor
    int dtype               # of fastbn.h; 0: none
    int64_t ndim
    int64_t* sizes
    int64_t* strides
    void* data


cdef bint describe(Tensor t, Description* d) noexcept nogil:
    cdef int32_t dtype, layout, device
    cdef int i
    memset(d, 0, sizeof(Description))
    if t == NULL or torch.get_layout(t, &layout) or torch.get_device_type(t, &device):
        return False
    if layout != strided or device != cpu:
        return False
    if torch.get_dtype(t, &dtype) or torch.get_dim(t, &d.ndim):
        return False
    if torch.get_sizes(t, &d.sizes) or torch.get_strides(t, &d.strides):
        return False
    d.tensor = t
    for i in range(4):
        if dtypes[i] == dtype:
            d.dtype = i + 1
    return d.dtype > 0 and torch.data(t, &d.data) == 0


cdef inline int size_of(int dtype) noexcept nogil:
    return 4 if dtype == FASTBN_FLOAT32 else 8 if dtype == FASTBN_FLOAT64 else 2


cdef inline Tensor optional(Value v) noexcept nogil:
    # NULL for None, and for a tensor that is not defined.
    cdef unsigned char is_defined = 0
    cdef Tensor t = <Tensor>(<Value*>v)[0] if v else NULL
    return t if t != NULL and torch.is_defined(t, &is_defined) == 0 and is_defined else NULL


cdef inline double real(Value v) noexcept nogil:
    cdef double number
    memcpy(&number, &v, sizeof(double))
    return number


cdef void strides_of(const Description* x, bint channels_last, int64_t* strides) noexcept nogil:
    cdef int64_t step = 1
    cdef int i, axis
    for i in range(<int>x.ndim):
        axis = <int>x.ndim - 1 - i
        if channels_last and axis > 0:
            axis = 1 if i == 0 else axis + 1
        strides[axis] = step
        step *= x.sizes[axis]


cdef bint is_in_order(const Description* x, const int64_t* strides) noexcept nogil:
    cdef int axis
    for axis in range(<int>x.ndim):
        if x.sizes[axis] != 1 and x.strides[axis] != strides[axis]:
            return False
    return True


cdef bint output_strides(const Description* x, int64_t* strides) noexcept nogil:
    # PyTorch's own: contiguous if x can be read so, else channels_last.
    strides_of(x, False, strides)
    if is_in_order(x, strides):
        return True
    if not 4 <= x.ndim <= 5:
        return False
    strides_of(x, True, strides)
    return is_in_order(x, strides)


cdef Tensor new_tensor(int dtype, int64_t ndim, const int64_t* sizes,
                       const int64_t* strides) noexcept nogil:
    # `dtype` 5 is uint8.
    cdef Tensor t = NULL
    if torch.empty(ndim, sizes, strides, dtypes[dtype - 1], cpu, 0, &t):
        return NULL
    return t


cdef Tensor new_vector(int dtype, int64_t n) noexcept nogil:
    cdef int64_t step = 1
    return new_tensor(dtype, 1, &n, &step)


# ---- vectors: parameters, their gradients, running statistics ----------------------------

cdef struct Vector:
    Tensor given            # NULL: there is none
    int dtype               # of `given`
    Tensor copy             # NULL: `given` itself is used
    void* data


cdef struct Shape:
    int64_t ndim
    const int64_t* sizes


cdef inline Shape of_channels(const Description* x) noexcept nogil:
    return Shape(1, x.sizes + 1)


cdef bint has_shape(const Description* d, Shape shape) noexcept nogil:
    cdef int axis
    if d.ndim != shape.ndim:
        return False
    for axis in range(<int>shape.ndim):
        if d.sizes[axis] != shape.sizes[axis]:
            return False
    return True


cdef int64_t count_in(Shape shape) noexcept nogil:
    cdef int64_t count = 1
    cdef int axis
    for axis in range(<int>shape.ndim):
        count *= shape.sizes[axis]
    return count


cdef bint is_gapless(const Description* d) noexcept nogil:
    cdef int64_t[MOST_AXES] strides
    strides_of(d, False, strides)
    return is_in_order(d, strides)


cdef bint take_vector(Tensor t, const Description* x, Shape shape, Vector* v) noexcept nogil:
    cdef Description d
    cdef int64_t[MOST_AXES] strides
    memset(v, 0, sizeof(Vector))
    if t == NULL:
        return True
    if not describe(t, &d) or not has_shape(&d, shape):
        return False
    if d.dtype != x.dtype and (d.dtype != FASTBN_FLOAT32 or x.dtype == FASTBN_FLOAT64):
        return False
    v.given, v.dtype, v.data = t, d.dtype, d.data
    if d.dtype == vector_dtype(x) and is_gapless(&d):
        return True
    strides_of(&d, False, strides)
    v.copy = new_tensor(vector_dtype(x), shape.ndim, shape.sizes, strides)
    return (v.copy != NULL and torch.copy(v.copy, t, 0) == 0
            and torch.data(v.copy, &v.data) == 0)


cdef inline int vector_dtype(const Description* x) noexcept nogil:
    return FASTBN_FLOAT64 if x.dtype == FASTBN_FLOAT64 else FASTBN_FLOAT32


cdef void write_back(Vector* v) noexcept nogil:
    if v.copy != NULL:
        torch.copy(v.given, v.copy, 0)


cdef void drop_vector(Vector* v) noexcept nogil:
    if v.copy != NULL:
        torch.delete(v.copy)
    v.copy = NULL


# ---- saved statistics --------------------------------------------------------------------
# PyTorch's own backward reads them, so they have its type: float32. Behind them in the same
# storage lie the numbers in float64, and a mark. A copy of the elements has lost them.

cdef int64_t exact_from(int64_t n, int dtype) noexcept nogil:
    return (n * size_of(dtype) + 7) // 8 * 8


cdef Tensor new_statistics(Shape shape, int dtype, double** exact) noexcept nogil:
    cdef int64_t[MOST_AXES] strides
    cdef Description like
    cdef int64_t n = count_in(shape), bytes = exact_from(n, dtype) + 8 * (n + 1)
    cdef Tensor whole, part = NULL
    cdef void* data = NULL
    like.ndim, like.sizes = shape.ndim, <int64_t*>shape.sizes
    strides_of(&like, False, strides)
    if dtype == FASTBN_FLOAT64:
        whole = new_tensor(dtype, shape.ndim, shape.sizes, strides)
        if whole != NULL and torch.data(whole, &data) == 0:
            exact[0] = <double*>data
        return whole
    whole = new_vector(dtype, bytes // size_of(dtype))
    if whole == NULL:
        return NULL
    if torch.data(whole, &data) or (
            torch.view(whole, shape.ndim, shape.sizes, strides, 0, &part)):
        part = NULL
    torch.delete(whole)
    exact[0] = <double*>(<char*>data + exact_from(n, dtype))
    return part


cdef Tensor rounded(const double* exact, Shape shape) noexcept nogil:
    # A new tensor of float32; NULL: no memory.
    cdef int64_t[MOST_AXES] strides
    cdef Description like
    cdef Tensor t
    cdef void* data = NULL
    cdef int64_t i
    like.ndim, like.sizes = shape.ndim, <int64_t*>shape.sizes
    strides_of(&like, False, strides)
    t = new_tensor(FASTBN_FLOAT32, shape.ndim, shape.sizes, strides)
    if t == NULL or torch.data(t, &data):
        return t
    for i in range(count_in(shape)):
        (<float*>data)[i] = <float>exact[i]
    return t


cdef bint round_vector(Tensor t, Shape shape, int dtype, const double* exact) noexcept nogil:
    # Half precision by PyTorch's own conversion.
    cdef Tensor single
    cdef void* data = NULL
    cdef int64_t i
    cdef int code = 0
    if dtype == FASTBN_FLOAT64:
        return True
    if dtype == FASTBN_FLOAT32:
        code = torch.data(t, &data)
        for i in range(count_in(shape) if code == 0 else 0):
            (<float*>data)[i] = <float>exact[i]
    else:
        single = rounded(exact, shape)
        code = 1 if single == NULL else torch.copy(t, single, 0)
        drop(single)
    return code == 0


cdef bint round_statistics(Tensor t, Shape shape, int dtype, const double* exact) noexcept nogil:
    if dtype != FASTBN_FLOAT64:
        memcpy(<void*>(exact + count_in(shape)), &MARK, 8)
    return round_vector(t, shape, dtype, exact)


cdef const double* exact_statistics(Tensor t, const Description* d) noexcept nogil:
    # Those behind the elements; NULL: the tensor is a copy, or another's.
    cdef int64_t n = count_in(Shape(d.ndim, d.sizes)), bytes = 0, offset = 0
    cdef const double* exact
    if torch.get_storage_size(t, &bytes) or torch.get_storage_offset(t, &offset):
        return NULL
    if offset != 0 or not is_gapless(d) or bytes != exact_from(n, d.dtype) + 8 * (n + 1):
        return NULL
    exact = <const double*>(<char*>d.data + exact_from(n, d.dtype))
    return exact if memcmp(exact + n, &MARK, 8) == 0 else NULL


cdef bint rounds_to(const double* exact, const Description* d) noexcept nogil:
    # Are the elements still those that were rounded? Somebody may have written to them.
    cdef int64_t n = count_in(Shape(d.ndim, d.sizes)), i
    cdef Tensor again
    cdef void* data = NULL
    cdef bint same = False
    cdef float single
    if d.dtype == FASTBN_FLOAT32:
        for i in range(n):
            single = <float>exact[i]
            if memcmp(&single, <float*>d.data + i, sizeof(float)):
                return False
        return True
    again = new_vector(d.dtype, n)
    if again != NULL:
        same = (round_vector(again, Shape(1, &n), d.dtype, exact) and torch.data(again, &data) == 0
                and memcmp(data, d.data, n * size_of(d.dtype)) == 0)
        torch.delete(again)
    return same


cdef bint read_statistics(Tensor t, Shape shape, double* to) noexcept nogil:
    # The numbers in float64, where they are still those that were rounded.
    cdef int64_t[MOST_AXES] strides
    cdef int64_t n = count_in(shape)
    cdef Description d
    cdef const double* exact
    cdef Tensor wide
    cdef void* data = NULL
    cdef bint read
    if not describe(t, &d) or not has_shape(&d, shape):
        return False
    exact = NULL if d.dtype == FASTBN_FLOAT64 else exact_statistics(t, &d)
    if exact != NULL and rounds_to(exact, &d):
        memcpy(to, exact, n * sizeof(double))
        return True
    strides_of(&d, False, strides)
    wide = new_tensor(FASTBN_FLOAT64, d.ndim, d.sizes, strides)
    read = wide != NULL and torch.copy(wide, t, 0) == 0 and torch.data(wide, &data) == 0
    if read:
        memcpy(to, data, n * sizeof(double))
    drop(wide)
    return read


# ---- calls ---------------------------------------------------------------------------------

cdef void begin_call(fastbn_call* c, int norm, const Description* x) noexcept nogil:
    memset(c, 0, sizeof(fastbn_call))
    c.struct_size = sizeof(fastbn_call)
    c.norm, c.dtype, c.vector_dtype = norm, x.dtype, vector_dtype(x)
    c.ndim, c.shape, c.channel_axis = <int32_t>x.ndim, <const Py_ssize_t*>x.sizes, 1
    c.x.data, c.x.strides = x.data, <const Py_ssize_t*>x.strides


cdef bint run(fastbn_call* c) noexcept nogil:
    cdef Extras extras
    cdef Request request
    cdef uint32_t threads = 1
    cdef int code
    memset(&extras, 0, sizeof(Extras))
    extras.new_outputs = True
    if core.understand(c, &extras, &request) != FASTBN_OK or request.empty:
        return False
    if core.work_of(&request) >= PARALLEL_FROM and not forked():
        torch.threads(&threads)
    code = core.run(&request, <int>threads)
    if code == FASTBN_OK:
        core.commit(&request)
    core.release(&request)
    return code == FASTBN_OK


cdef bint has_values(const Description* x) noexcept nogil:
    return x.ndim <= MOST_AXES and count_in(Shape(x.ndim, x.sizes)) > 0


cdef bint is_taken(const Description* x, int64_t* strides) noexcept nogil:
    return 2 <= x.ndim and has_values(x) and output_strides(x, strides)


# Where the arguments of an operator stand on the stack.
ctypedef bint (*Compute)(const Places*, Value*, Tensor*) noexcept nogil

cdef struct Places:
    const char* name
    const char* own         # the operator that calls PyTorch's own kernel
    Compute compute         # False: fastbn does not take these arguments
    const char* kinds       # of each: a tensor, an optional one, a list, a number
    int outputs
    int running             # of batch norm; -1: none
    int training            # -1: always
    int momentum
    int eps


cdef void drop(Tensor t) noexcept nogil:
    if t != NULL:
        torch.delete(t)


cdef void drop_optional(Value v) noexcept nogil:
    if v:
        torch.delete(<Tensor>(<Value*>v)[0])
        if delete_value != NULL:
            delete_value(<Value*>v)
        else:
            free(<void*>v)


cdef Tensor undefined() noexcept nogil:
    cdef Tensor t = NULL
    torch.undefined(&t)
    return t


cdef inline Tensor tensor_at(const Places* p, Value* stack, int place) noexcept nogil:
    return optional(stack[place]) if p.kinds[place] == b"o" else <Tensor>stack[place]


cdef void drop_arguments(const Places* p, Value* stack) noexcept nogil:
    cdef int i
    for i in range(<int>strlen(p.kinds)):
        if p.kinds[i] == b"t":
            torch.delete(<Tensor>stack[i])
        elif p.kinds[i] == b"o":
            drop_optional(stack[i])
        elif p.kinds[i] == b"l":
            torch.delete_list(<void*>stack[i])


cdef void pass_on(const Places* p, Value* stack) noexcept nogil:
    # To PyTorch's own kernel; what it raised is thrown, and no result is left.
    cdef int i, code = torch.call(p.own, b"", stack, abi)
    if code != 0 and not failed():
        keep_failure(0, CANNOT_CALL, strlen(CANNOT_CALL))
    if failed():
        if code == 0:
            for i in range(p.outputs):
                drop(<Tensor>stack[i])
        throw_failure()


cdef void answer(const Places* p, Value* stack) noexcept nogil:
    cdef Tensor[MOST_OUTPUTS] results
    cdef int i
    memset(results, 0, sizeof(results))
    if not (on and p.compute(p, stack, results)):
        for i in range(p.outputs):
            drop(results[i])
        pass_on(p, stack)
        return
    drop_arguments(p, stack)
    for i in range(p.outputs):
        stack[i] = <Value>(results[i] if results[i] != NULL else undefined())


cdef bint take_output_mask(Value list_, bint* wanted) noexcept nogil:
    cdef Value item
    cdef int i
    for i in range(3):
        if torch.list_item(<void*>list_, i, &item):
            return False
        wanted[i] = (item & 0xff) != 0
    return True


cdef bint ordered(Description* d, const int64_t* strides, Tensor* copy) noexcept nogil:
    # In that order, if need be as a copy.
    if is_in_order(d, strides):
        return True
    copy[0] = new_tensor(d.dtype, d.ndim, d.sizes, strides)
    return (copy[0] != NULL and torch.copy(copy[0], d.tensor, 0) == 0
            and describe(copy[0], d))


cdef bint same_shape(const Description* a, const Description* b) noexcept nogil:
    return a.dtype == b.dtype and has_shape(a, Shape(b.ndim, b.sizes))


cdef bint agree(const Vector* a, const Vector* b) noexcept nogil:
    # PyTorch refuses vectors of different types, in its own words.
    return a.given == NULL or b.given == NULL or a.dtype == b.dtype


cdef bint new_gradient(const Description* x, const Vector* like, Shape shape, Vector* v,
                       Tensor* result) noexcept nogil:
    # Of the type of a parameter.
    cdef int64_t[MOST_AXES] strides
    cdef Description d
    if not describe(like.given, &d):
        return False
    strides_of(&d, False, strides)
    result[0] = new_tensor(d.dtype, shape.ndim, shape.sizes, strides)
    return result[0] != NULL and take_vector(result[0], x, shape, v)


cdef int parameter_dtype(const Description* x, const Vector* weight,
                         const Vector* bias) noexcept nogil:
    # Saved statistics have it: float32 beside half precision.
    if weight.given != NULL:
        return weight.dtype
    return bias.dtype if bias.given != NULL else x.dtype


cdef bint run_backward(fastbn_call* c, const Description* x, const Description* dy,
                       const int64_t* strides, Tensor* results) noexcept nogil:
    # dx is written in any case, and dropped by who does not want it.
    c.dy.data, c.dy.strides = dy.data, <const Py_ssize_t*>dy.strides
    results[0] = new_tensor(x.dtype, x.ndim, x.sizes, strides)
    if results[0] == NULL or torch.data(results[0], &c.out.data):
        return False
    c.out.strides = <const Py_ssize_t*>strides
    return run(c)


include "batch_norm.pxi"
include "instances.pxi"


# ---- the table of operators ----------------------------------------------------------------

cdef enum:
    OPERATORS = 10

cdef Places[OPERATORS] places
places[0] = Places(
    b"native_batch_norm", b"fastbn_pytorch::native_batch_norm",
    forward_batch, b"toooonnn", 3, 3, 5, 6, 7)
places[1] = Places(
    b"_native_batch_norm_legit", b"fastbn_pytorch::_native_batch_norm_legit",
    forward_batch, b"toottnnn", 3, 3, 5, 6, 7)
places[2] = Places(
    b"_native_batch_norm_legit.no_stats", b"fastbn_pytorch::_native_batch_norm_legit_no_stats",
    forward_batch, b"toonnn", 3, -1, 3, 4, 5)
places[3] = Places(
    b"_batch_norm_with_update", b"fastbn_pytorch::_batch_norm_with_update",
    forward_batch, b"toottnn", 4, 3, -1, 5, 6)
places[4] = Places(
    b"native_batch_norm_backward", b"fastbn_pytorch::native_batch_norm_backward",
    backward_batch, b"ttooooonnl", 3, 3, 7, 0, 8)
places[5] = Places(
    b"batch_norm_backward", b"fastbn_pytorch::batch_norm_backward",
    backward_batch, b"tttoooonnlt", 3, 3, 7, 0, 8)
places[6] = Places(
    b"native_layer_norm", b"fastbn_pytorch::native_layer_norm",
    forward_layer, b"tloon", 3, -1, 0, 0, 4)
places[7] = Places(
    b"native_layer_norm_backward", b"fastbn_pytorch::native_layer_norm_backward",
    backward_layer, b"ttlttool", 3, -1, 0, 0, 0)
places[8] = Places(
    b"native_group_norm", b"fastbn_pytorch::native_group_norm",
    forward_group, b"toonnnnn", 3, -1, 0, 0, 7)
places[9] = Places(
    b"native_group_norm_backward", b"fastbn_pytorch::native_group_norm_backward",
    backward_group, b"ttttonnnnl", 3, -1, 0, 0, 0)


cdef void kernel_0(Value* stack, uint64_t given, uint64_t returned) noexcept nogil:
    answer(&places[0], stack)


cdef void kernel_1(Value* stack, uint64_t given, uint64_t returned) noexcept nogil:
    answer(&places[1], stack)


cdef void kernel_2(Value* stack, uint64_t given, uint64_t returned) noexcept nogil:
    answer(&places[2], stack)


cdef void kernel_3(Value* stack, uint64_t given, uint64_t returned) noexcept nogil:
    answer(&places[3], stack)


cdef void kernel_4(Value* stack, uint64_t given, uint64_t returned) noexcept nogil:
    answer(&places[4], stack)


cdef void kernel_5(Value* stack, uint64_t given, uint64_t returned) noexcept nogil:
    answer(&places[5], stack)


cdef void kernel_6(Value* stack, uint64_t given, uint64_t returned) noexcept nogil:
    answer(&places[6], stack)


cdef void kernel_7(Value* stack, uint64_t given, uint64_t returned) noexcept nogil:
    answer(&places[7], stack)


cdef void kernel_8(Value* stack, uint64_t given, uint64_t returned) noexcept nogil:
    answer(&places[8], stack)


cdef void kernel_9(Value* stack, uint64_t given, uint64_t returned) noexcept nogil:
    answer(&places[9], stack)


cdef Kernel[OPERATORS] kernels = [
    kernel_0, kernel_1, kernel_2, kernel_3, kernel_4, kernel_5, kernel_6, kernel_7, kernel_8,
    kernel_9]

#: Operators by name, with the number of tensors that each returns.
TABLE = {places[i].name.decode(): places[i].outputs for i in range(OPERATORS)}

cdef void* library = NULL


def switch(bint state):
    """Let the registered kernels compute, or pass everything on to PyTorch's own."""
    global on
    on = state


def register(names):
    """Put fastbn's kernels in the place of PyTorch's, for the life of the process.

    PyTorch's table of kernels has no lock for readers, so they are never taken out again.
    """
    global library
    if torch.new_library(b"aten", b"CPU", b"fastbn", 0, &library):
        raise RuntimeError("PyTorch refused a library of kernels")
    for i in range(OPERATORS):
        if places[i].name.decode() in names and torch.add_kernel(
                library, places[i].name, kernels[i], abi):
            torch.delete_library(library)
            raise RuntimeError(f"PyTorch refused a kernel of {places[i].name.decode()}")


notice_forks(_forks.WITH_OPENMP)

# SPDX-License-Identifier: BSD-3-Clause
# Calls whose tensors are a nest of loops and not a view: statistics of integers, normalize,
# denormalize. Sums of integers are exact, and elements are converted one by one: so nothing
# follows from how such a call is cut, and any strides will do.
#
#     statistics               sums | merge
#     normalize, denormalize   convert
#
# May check, order axes, set pointers. May not touch an element. A part of core.pyx.

cdef enum:
    DENSE_PANEL = 65536         # elements of a panel that is summed where it lies
    MOST_CHANNELS = 512         # of such a panel
    SQUARE = 64                 # rows of a panel that is turned
    TASK_BYTES = 256 << 10

cdef const ImageKernels* image_kernels
cdef KernelTable integer_tables[2]      # sizes only, by the bytes of an element


cdef void set_image_kernels(const void* kernels) noexcept nogil:
    global image_kernels
    image_kernels = <const ImageKernels*>kernels


cdef inline bint is_integer(int dtype) noexcept nogil:
    return is_among(dtype, FASTBN_UINT8, FASTBN_INT16)


cdef inline bint converts(const fastbn_call* call) noexcept nogil:
    return is_among(call.operation, FASTBN_NORMALIZE, FASTBN_DENORMALIZE)


cdef inline bint is_image(const fastbn_call* call) noexcept nogil:
    return converts(call) or (call.operation == FASTBN_STATISTICS and is_integer(call.dtype))


cdef const KernelTable* table_for(int dtype) noexcept nogil:
    # NULL: there are no elements of that type.
    cdef KernelTable* table
    cdef int bytes
    if not is_integer(dtype):
        return kernels_for(dtype)
    bytes = 1 if dtype == FASTBN_UINT8 or dtype == FASTBN_INT8 else 2
    table = &integer_tables[bytes - 1]
    table.elem_size = table.real_size = bytes
    table.activation_count = 1
    return table


# ---- checks --------------------------------------------------------------------------

cdef int check_image_kind(Request* r) noexcept nogil:
    # Which types does the operation have?
    cdef const fastbn_call* call = &r.call
    if is_integer(call.dtype) and not (call.operation in (FASTBN_STATISTICS, FASTBN_NORMALIZE)):
        return fail(r, FASTBN_BAD_DTYPE, ARG_DTYPE)
    if not converts(call):
        return FASTBN_OK
    if call.norm_mean == NULL:
        return fail(r, FASTBN_NULL_POINTER, ARG_NORM_MEAN)
    if call.norm_std == NULL:
        return fail(r, FASTBN_NULL_POINTER, ARG_NORM_STD)
    if not (call.max_value > 0.0 and is_finite(call.max_value)):
        return fail(r, FASTBN_BAD_NUMBER, ARG_MAX_VALUE)
    if table_for(call.out_dtype) == NULL or (
            call.operation == FASTBN_NORMALIZE and is_integer(call.out_dtype)):
        return fail(r, FASTBN_BAD_DTYPE, ARG_OUT_DTYPE)
    return FASTBN_OK


cdef int check_image_tensor(Request* r, int argument, const fastbn_tensor* tensor,
                            int dtype) noexcept nogil:
    if tensor.data == NULL:
        return fail(r, FASTBN_NULL_POINTER, argument)
    if <size_t>tensor.data % table_for(dtype).elem_size:
        return fail(r, FASTBN_MISALIGNED, argument)
    return FASTBN_OK


cdef int check_apart(Request* r, const Memory* out, const void* data, const Axes* axes,
                     Py_ssize_t itemsize, int argument) noexcept nogil:
    cdef Memory other = Memory(<const char*>data, axes[0], itemsize)
    if not overlap(out, &other):
        return FASTBN_OK
    r.fault.other = argument
    return fail(r, FASTBN_OVERLAP, ARG_OUT)


cdef int check_image_memory(Request* r, const Axes* x, const Axes* out) noexcept nogil:
    cdef const fastbn_call* call = &r.call
    cdef Py_ssize_t channels = call.shape[call.channel_axis], one = 1
    cdef Axes vector = Axes(1, &channels, &one, 1)
    cdef Memory written = Memory(<const char*>call.out.data, out[0],
                                 table_for(call.out_dtype).elem_size)
    cdef int code
    if steps_over_itself(out):
        r.fault.other = ARG_OUT
        return fail(r, FASTBN_BAD_STRIDES, ARG_OUT)
    code = check_apart(r, &written, call.x.data, x, r.kernels.elem_size, ARG_X)
    if code == FASTBN_OK:
        code = check_apart(r, &written, call.norm_mean, &vector, sizeof(double), ARG_NORM_MEAN)
    return code if code != FASTBN_OK else check_apart(
        r, &written, call.norm_std, &vector, sizeof(double), ARG_NORM_STD)


cdef int check_deviations(Request* r) noexcept nogil:
    # The only check that reads vectors: when a call begins.
    cdef const fastbn_call* call = &r.call
    cdef Py_ssize_t c
    if not converts(call):
        return FASTBN_OK
    for c in range(call.shape[call.channel_axis]):
        if not is_finite(call.norm_mean[c]):
            return fail(r, FASTBN_BAD_NUMBER, ARG_NORM_MEAN)
        if not (call.norm_std[c] > 0.0 and is_finite(call.norm_std[c])):
            return fail(r, FASTBN_BAD_NUMBER, ARG_NORM_STD)
    return FASTBN_OK


# ---- the nest of loops ---------------------------------------------------------------

cdef void put_axis(Nest* nest, int place, Py_ssize_t size, Py_ssize_t x,
                   Py_ssize_t other) noexcept nogil:
    # Before that of this place.
    cdef int i
    for i in range(nest.ndim, place, -1):
        nest.size[i], nest.x[i], nest.other[i] = nest.size[i - 1], nest.x[i - 1], nest.other[i - 1]
    nest.size[place], nest.x[place], nest.other[place] = size, x, other
    nest.ndim += 1
    if nest.channel >= place:
        nest.channel += 1


cdef void drop_axis(Nest* nest, int place) noexcept nogil:
    cdef int i
    nest.ndim -= 1
    for i in range(place, nest.ndim):
        nest.size[i], nest.x[i], nest.other[i] = nest.size[i + 1], nest.x[i + 1], nest.other[i + 1]
    if nest.channel > place:
        nest.channel -= 1


cdef void add_axis(Image* image, Py_ssize_t size, Py_ssize_t x, Py_ssize_t other,
                   bint is_channel, bint by_other) noexcept nogil:
    # Where it belongs: the axes are sorted by the steps of x, or of the other tensor, which
    # become positive.
    cdef Nest* nest = &image.nest
    cdef const Py_ssize_t* keys = nest.x
    cdef int place = nest.ndim
    cdef Py_ssize_t key = other if by_other else x
    cdef Py_ssize_t x_size = table_for(image.dtype).elem_size
    cdef Py_ssize_t other_size = table_for(image.out_dtype).elem_size
    if key < 0:
        image.x += (size - 1) * x * x_size
        if image.other != NULL:
            image.other += (size - 1) * other * other_size
        x, other, key = -x, -other, -key
        if is_channel:
            image.first_channel, image.channel_step = size - 1, -1
    if by_other:
        keys = nest.other
    while place > 0 and key > keys[place - 1]:
        place -= 1
    put_axis(nest, place, size, x, other)
    if is_channel:
        nest.channel = place


cdef void merge_axes(Nest* nest) noexcept nogil:
    # Neighbours that step as one, on both sides.
    cdef int i = 0
    while i + 1 < nest.ndim:
        if (nest.channel not in (i, i + 1)
                and nest.x[i] == nest.size[i + 1] * nest.x[i + 1]
                and nest.other[i] == nest.size[i + 1] * nest.other[i + 1]):
            nest.size[i + 1] *= nest.size[i]
            drop_axis(nest, i)
            i = maximum(0, i - 1)
        else:
            i += 1


cdef void choose_rows(Nest* nest) noexcept nogil:
    # Of a conversion: the axis along which x lies, so that panels are squares of both sides.
    cdef int i, best = nest.ndim - 1
    cdef Py_ssize_t size, x, other
    cdef bint is_channel
    for i in range(nest.ndim - 2, -1, -1):
        if nest.x[i] != 0 and (nest.x[best] == 0 or magnitude(nest.x[i]) < magnitude(
                nest.x[best])):
            best = i
    if best >= nest.ndim - 2:
        return
    size, x, other, is_channel = nest.size[best], nest.x[best], nest.other[best], (
        nest.channel == best)
    drop_axis(nest, best)
    if is_channel:
        nest.channel = -1
    put_axis(nest, nest.ndim - 1, size, x, other)
    if is_channel:
        nest.channel = nest.ndim - 2


cdef void settle_nest(Request* r, const Axes* x, const Axes* other) noexcept nogil:
    cdef const fastbn_call* call = &r.call
    cdef Image* image = &r.image
    cdef Nest* nest = &image.nest
    cdef bint conversion = converts(call), is_channel
    cdef Py_ssize_t other_step
    cdef int axis
    nest.ndim, nest.channel = 0, -1
    image.repeats = 1
    image.first_channel, image.channel_step = 0, 1
    for axis in range(call.ndim):
        is_channel = axis == call.channel_axis
        other_step = other.strides[axis] if other != NULL else 0
        if call.shape[axis] == 1:
            continue
        if not conversion and x.strides[axis] == 0 and other_step == 0 and not is_channel:
            image.repeats *= call.shape[axis]       # the same again
            continue
        add_axis(image, call.shape[axis], x.strides[axis], other_step, is_channel, conversion)
    merge_axes(nest)
    while nest.ndim < 2:
        put_axis(nest, 0, 1, 0, 0)
    if conversion:
        choose_rows(nest)


cdef Py_ssize_t fitting(Py_ssize_t size, Py_ssize_t most) noexcept nogil:
    # A share of `size` of at most so many; where there are several, a multiple of 64.
    cdef Py_ssize_t some
    most = maximum(1, most)
    if size <= most:
        return size
    some = ceil_div(ceil_div(size, ceil_div(size, most)), 64) * 64
    return some if some <= most else maximum(most // 64 * 64, 1 if most >= 64 else most)


cdef bint is_marked(const Image* image) noexcept nogil:
    # Does the mask lie beside bytes, or beside three at a time, so that it need not be spread?
    cdef const Nest* nest = &image.nest
    cdef int last = nest.ndim - 1
    if (table_for(image.dtype).elem_size != 1 or image.other == NULL or image.nodata != NULL
            or nest.x[last] != 1):
        return False
    if nest.channel == last:
        return nest.size[last] == 3 and nest.x[last - 1] == 3 and nest.other[last - 1] == 1
    return nest.other[last] == 1


cdef void settle_panels(Image* image) noexcept nogil:
    # Few enough elements that a task has room for them, where they are gathered or scattered.
    cdef const Nest* nest = &image.nest
    cdef int last = nest.ndim - 1
    cdef Py_ssize_t rows = nest.size[last - 1], columns = nest.size[last], axis
    cdef bint by_channel = nest.channel == last, apart = nest.x[last] != 1
    cdef bint narrow = by_channel and columns < FULL_ROW and nest.x[last - 1] != columns
    cdef bint spreads = (image.other != NULL or image.nodata != NULL) and not image.marked
    cdef Py_ssize_t most = PANEL if apart or narrow or spreads else DENSE_PANEL
    if image.conversion:
        # Long runs: each may begin and end within a line of `out`.
        most = 4 * PANEL
        if nest.other[last] != 1 or (by_channel and nest.other[last - 1] != columns):
            most = PANEL
        elif apart:
            most = maximum(PANEL, most // table_for(image.dtype).elem_size)
    if by_channel:
        image.panel_columns = fitting(columns, TABLE if image.conversion else MOST_CHANNELS)
        image.panel_rows = fitting(rows, most // image.panel_columns)
    else:
        image.panel_rows = 1
        if image.conversion and apart and nest.x[last - 1] == 1:
            image.panel_rows = minimum(rows, SQUARE)
        image.panel_columns = fitting(columns, most // image.panel_rows)
        if image.conversion:
            image.panel_rows = fitting(rows, most // image.panel_columns)
    image.row_panels = ceil_div(rows, image.panel_rows)
    image.column_panels = ceil_div(columns, image.panel_columns)
    image.panels = image.row_panels * image.column_panels
    for axis in range(last - 1):
        image.panels *= nest.size[axis]
    most = table_for(image.dtype).elem_size
    if image.conversion:
        most += table_for(image.out_dtype).elem_size
    image.task_panels = maximum(
        1, TASK_BYTES // (most * image.panel_rows * image.panel_columns))


cdef int understand_image(Request* r) noexcept nogil:
    cdef const fastbn_call* call = &r.call
    cdef Image* image = &r.image
    cdef Py_ssize_t gapless[2][MAX_DIMENSIONS]
    cdef Axes x = axes_of_tensor(call, &call.x, gapless[0]), out
    cdef bint conversion = converts(call)
    cdef int code
    memset(image, 0, sizeof(Image))
    image.dtype, image.conversion = call.dtype, conversion
    image.out_dtype = call.out_dtype if conversion else FASTBN_UINT8
    image.channels = r.parameters
    image.inverse = call.operation == FASTBN_DENORMALIZE
    image.nodata = r.extras.nodata
    image.mean, image.m2, image.minimum, image.maximum = (
        call.mean, call.m2, call.minimum, call.maximum)
    image.sums, image.counts = r.extras.sums, r.extras.counts
    image.norm_mean, image.norm_std, image.max_value = (
        call.norm_mean, call.norm_std, call.max_value)
    image.repeats = 1
    if r.empty:
        return FASTBN_OK
    code = check_image_tensor(r, ARG_X, &call.x, call.dtype)
    if code == FASTBN_OK and conversion:
        code = check_image_tensor(r, ARG_OUT, &call.out, call.out_dtype)
        out = axes_of_tensor(call, &call.out, gapless[1])
        if code == FASTBN_OK:
            code = check_image_memory(r, &x, &out)
    if code != FASTBN_OK:
        return code
    image.x = <const char*>call.x.data
    image.other = <char*>call.out.data
    if not conversion:
        image.other = <char*>call.mask.data
        out = axes_of_tensor(call, &call.mask, gapless[1])
    settle_nest(r, &x, &out if image.other != NULL else NULL)
    image.marked = not conversion and is_marked(image)
    settle_panels(image)
    return FASTBN_OK


# ---- memory, phases ------------------------------------------------------------------

cdef inline Py_ssize_t count_in_call(const Request* r) noexcept nogil:
    return 0 if r.empty else size_of_axes(&r.call, 0, r.call.ndim)


cdef Py_ssize_t bytes_of_image(const Request* r) noexcept nogil:
    # That are read or written.
    cdef Py_ssize_t size = r.kernels.elem_size
    if converts(&r.call):
        size += table_for(r.call.out_dtype).elem_size
    return count_in_call(r) * size // maximum(1, r.image.repeats)


cdef size_t size_of_image(Request* r) noexcept nogil:
    cdef Image* image = &r.image
    r.job.plan.bytes = bytes_of_image(r)
    image.workers = r.workers
    image.streaming = r.job.plan.bytes >= <size_t>(CACHE if r.workers > 1 else CACHE_OF_ONE)
    if not image.conversion:
        return r.workers * image.channels * image_kernels.total_size + size_of_team(r) + LINE
    image.table = image.channels * maximum(1, TABLE // maximum(1, image.channels))
    return image.table * (image_kernels.coefficient_kinds * sizeof(double)
                          + image_kernels.split_kinds * sizeof(float)) + size_of_team(r) + LINE


cdef void use_image_memory(Request* r, char* memory) noexcept nogil:
    cdef Image* image = &r.image
    cdef char* place = memory
    if image.conversion:
        image.coefficients = <double*>place
        place += image.table * image_kernels.coefficient_kinds * sizeof(double)
        image.splits = <float*>place
        place += image.table * image_kernels.split_kinds * sizeof(float)
        image_kernels.fill_coefficients(image)
    else:
        image.totals = place
        place += r.workers * image.channels * image_kernels.total_size
        image_kernels.begin_sums(image, 0, r.workers, 0)
    r.shares = on_a_line(place)


cdef void image_task(const Phase* phase, Py_ssize_t i, int worker) noexcept nogil:
    phase.image_kernel(&phase.request.image, i, i + 1, worker)


cdef void merge_image(const Phase* phase, Py_ssize_t i, int worker) noexcept nogil:
    image_kernels.merge_sums(&phase.request.image, 0, phase.request.image.channels, worker)


cdef void list_image_phases(const Request* r, Phases* phases) noexcept nogil:
    cdef const Image* image = &r.image
    cdef Phase* phase = add(phases, r, &r.job, image_task,
                            ceil_div(image.panels, image.task_panels) if not r.empty else 0)
    phase.image_kernel = image_kernels.convert if image.conversion else image_kernels.add_sums
    if not image.conversion:
        add(phases, r, &r.job, merge_image, 1)

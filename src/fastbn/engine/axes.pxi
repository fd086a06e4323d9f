# SPDX-License-Identifier: BSD-3-Clause
# Axes -> a view: the order of the axes in memory, whether a view can describe them, and
# where its operands are. May not touch the elements, allocate. A part of core.pyx.

cdef inline Py_ssize_t magnitude(Py_ssize_t value) noexcept nogil:
    return -value if value < 0 else value


cdef int memory_order(const Axes* x, int first, int end, int skipped,
                      int* order) noexcept nogil:
    # Equal strides keep the logical order; so does a stride of 0, which has no place of
    # its own.
    cdef int axis, i, place, n = 0
    cdef Py_ssize_t stride, other
    for axis in range(first, end):
        if x.shape[axis] <= 1 or axis == skipped:
            continue
        stride = magnitude(x.strides[axis])
        place = n
        for i in range(n - 1, -1, -1):
            other = magnitude(x.strides[order[i]])
            if stride == 0 or other == 0:
                continue
            if other >= stride:
                break
            place = i
        for i in range(n, place, -1):
            order[i] = order[i - 1]
        order[place] = axis
        n += 1
    return n


cdef bint steps_over_itself(const Axes* a) noexcept nogil:
    # True unless each axis steps over all that the faster ones cover.
    cdef int order[MAX_DIMENSIONS]
    cdef int i, n = memory_order(a, 0, a.ndim, NO_AXIS, order)
    cdef Py_ssize_t covered = a.unit
    for i in range(n - 1, -1, -1):
        if magnitude(a.strides[order[i]]) < covered:
            return True
        covered += (a.shape[order[i]] - 1) * magnitude(a.strides[order[i]])
    return False


cdef void sort_by_channel(const Axes* x, int axis, int instance_axis,
                          Order* order) noexcept nogil:
    cdef int i
    order.instances = instance_axis != NO_AXIS and x.shape[instance_axis] > 1
    order.axes[0] = instance_axis
    order.n = order.instances + memory_order(x, 0, x.ndim, instance_axis,
                                             order.axes + order.instances)
    order.outer = order.instances
    order.has_channel = False
    for i in range(order.instances, order.n):
        if order.axes[i] == axis:
            order.outer = i
            order.has_channel = True


cdef void sort_by_features(const Axes* x, int kept, Order* order) noexcept nogil:
    # The channels are those of the first `kept` axes, the features of the others.
    order.instances = order.has_channel = False
    order.outer = memory_order(x, 0, kept, NO_AXIS, order.axes)
    order.n = order.outer + memory_order(x, kept, x.ndim, NO_AXIS, order.axes + order.outer)


cdef inline bint ascending(const int* axes, int n) noexcept nogil:
    cdef int i
    for i in range(1, n):
        if axes[i] < axes[i - 1]:
            return False
    return True


cdef inline bint follows(const Axes* a, int slow, int fast) noexcept nogil:
    # Do the two axes step through memory as one axis would?
    return a.strides[slow] == a.shape[fast] * a.strides[fast]


cdef bint gapless_inwards(const Axes* a, const Order* order) noexcept nogil:
    # From the channel axis on.
    cdef int i
    if order.n > order.outer and a.strides[order.axes[order.n - 1]] != a.unit:
        return False
    for i in range(order.outer + order.has_channel, order.n - 1):
        if not follows(a, order.axes[i], order.axes[i + 1]):
            return False
    return True


cdef uint64_t find_breaks(const Axes* a, const Order* order) noexcept nogil:
    # Where the outer axes do not step as one: bit i, before axes[i].
    cdef uint64_t found = 0
    cdef int i
    for i in range(order.instances + 1, order.outer):
        if not follows(a, order.axes[i - 1], order.axes[i]):
            found |= <uint64_t>1 << i
    return found


cdef inline bint at_most_one_bit(uint64_t bits) noexcept nogil:
    return bits & (bits - 1) == 0


cdef inline int split_at(uint64_t found) noexcept nogil:
    # Where the outer axes are split by the one break: the view's `outer` ends there,
    # and `middle` begins.
    cdef int split = 0
    while found >> split > 1:
        split += 1
    return split


cdef bint channels_in_a_row(const Axes* x, const Order* order) noexcept nogil:
    # Do the channels of a group lie side by side?
    cdef Py_ssize_t inner = x.unit
    cdef int i
    for i in range(order.outer + order.has_channel, order.n):
        inner *= x.shape[order.axes[i]]
    return not order.has_channel or x.strides[order.axes[order.outer]] == inner


cdef void settle_view(const Axes* x, const Order* order, int split, Py_ssize_t channels,
                      View* view) noexcept nogil:
    cdef int i
    view.channels = channels
    view.outer = view.middle = view.inner = 1
    view.features = False
    for i in range(order.instances, order.n):
        if i < split:
            view.outer *= x.shape[order.axes[i]]
        elif i < order.outer:
            view.middle *= x.shape[order.axes[i]]
        elif i >= order.outer + order.has_channel:
            view.inner *= x.shape[order.axes[i]]


cdef Operand operand_of(const Axes* a, const Order* order, int split, const View* view,
                        void* data) noexcept nogil:
    cdef Operand operand
    operand.data = data
    operand.channel = view.inner
    if order.has_channel:
        operand.channel = a.strides[order.axes[order.outer]] // a.unit
    operand.middle = view.channels * view.inner
    if order.outer > order.instances:
        operand.middle = a.strides[order.axes[order.outer - 1]] // a.unit
    operand.outer = view.middle * operand.middle
    if split:
        operand.outer = a.strides[order.axes[split - 1]] // a.unit
    operand.instance = a.strides[order.axes[0]] // a.unit if order.instances else 0
    return operand


cdef void turn_to_features(Problem* problem, Buffers* b) noexcept nogil:
    # What is outer and middle are the channels.
    cdef View* view = &problem.view
    view.features = True
    view.channels = view.outer * view.middle
    problem.period = view.middle
    view.outer = view.middle = 1
    b.x.channel, b.dy.channel, b.out.channel = b.x.middle, b.dy.middle, b.out.middle
    b.residual.channel, b.dy_of_y.channel = b.residual.middle, b.dy_of_y.middle

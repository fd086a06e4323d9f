# SPDX-License-Identifier: BSD-3-Clause
# Where a panel lies: rows and columns of elements, the same of x and of what goes with it.
# May compute addresses; may not touch the elements.

cdef struct Panel:
    const char* x
    char* other
    Py_ssize_t rows, columns
    Py_ssize_t channel      # the first of them, as the axis counts
    Py_ssize_t first_column


cdef inline bint channels_in_columns(const Image* image) noexcept nogil:
    return image.nest.channel == image.nest.ndim - 1


cdef inline bint channels_in_rows(const Image* image) noexcept nogil:
    return image.nest.channel == image.nest.ndim - 2


cdef inline Py_ssize_t row_step(const Image* image) noexcept nogil:
    return image.nest.x[image.nest.ndim - 2]


cdef inline Py_ssize_t column_step(const Image* image) noexcept nogil:
    return image.nest.x[image.nest.ndim - 1]


cdef inline Py_ssize_t other_row_step(const Image* image) noexcept nogil:
    return image.nest.other[image.nest.ndim - 2]


cdef inline Py_ssize_t other_column_step(const Image* image) noexcept nogil:
    return image.nest.other[image.nest.ndim - 1]


cdef inline Panel panel_at(const Image* image, Py_ssize_t index, Py_ssize_t x_size,
                           Py_ssize_t other_size) noexcept nogil:
    cdef const Nest* nest = &image.nest
    cdef Py_ssize_t row, column, at, x, other
    cdef int axis
    cdef Panel panel
    column = index % image.column_panels * image.panel_columns
    index //= image.column_panels
    row = index % image.row_panels * image.panel_rows
    index //= image.row_panels
    panel.rows = minimum(image.panel_rows, nest.size[nest.ndim - 2] - row)
    panel.columns = minimum(image.panel_columns, nest.size[nest.ndim - 1] - column)
    panel.channel = column if channels_in_columns(image) else row if channels_in_rows(image) else 0
    panel.first_column = column
    x = row * row_step(image) + column * column_step(image)
    other = row * other_row_step(image) + column * other_column_step(image)
    for axis in range(nest.ndim - 3, -1, -1):
        at = index % nest.size[axis]
        index //= nest.size[axis]
        x += at * nest.x[axis]
        other += at * nest.other[axis]
        if axis == nest.channel:
            panel.channel = at
    panel.x = image.x + x * x_size
    panel.other = image.other + other * other_size if image.other != NULL else NULL
    return panel

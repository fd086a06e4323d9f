# SPDX-License-Identifier: BSD-3-Clause
# Statistics of integers: sums of panels, for each worker and channel; and what they come to.
#
# A panel is one channel (a run), or rows of channels side by side. What lies apart is gathered.
# With a mask or `nodata`, a mask of elements is made for the panel, but where it lies as bytes do.
#
# May: sum integers. May not: round, but at the end.

cdef enum:
    MOST_BYTES = 2 * PANEL
    FULL_COLUMNS = 256      # of some pixels side by side: the last register is nearly full


cdef inline int bits_of_type(int dtype) noexcept nogil:
    return 8 if dtype == FASTBN_UINT8 or dtype == FASTBN_INT8 else 16


cdef inline int flip_of(int dtype) noexcept nogil:
    # What moves elements to the range of sums.
    return 0x80 if dtype == FASTBN_INT8 else 0x8000 if dtype == FASTBN_UINT16 else 0


cdef inline int offset_of(int dtype) noexcept nogil:
    # What that has subtracted.
    return -128 if dtype == FASTBN_INT8 else 32768 if dtype == FASTBN_UINT16 else 0


cdef inline Total* totals_of(const Image* image, int worker) noexcept nogil:
    return <Total*>image.totals + worker * image.channels


cdef inline Total* total_at(const Image* image, Total* totals, Py_ssize_t channel) noexcept nogil:
    return totals + image.first_channel + channel * image.channel_step


cdef void begin_sums(const Image* image, Py_ssize_t begin, Py_ssize_t end,
                     int worker) noexcept nogil:
    cdef Total* totals = <Total*>image.totals
    cdef Py_ssize_t i
    for i in range(begin * image.channels, end * image.channels):
        totals[i] = no_total(bits_of_type(image.dtype))


# ---- what is left out ----------------------------------------------------------------

cdef inline bint chooses(const Image* image) noexcept nogil:
    return image.other != NULL or image.nodata != NULL


cdef inline int number_at(const Image* image, const char* x, Py_ssize_t i) noexcept nogil:
    if image.dtype == FASTBN_UINT8:
        return (<const uint8_t*>x)[i]
    if image.dtype == FASTBN_INT8:
        return (<const int8_t*>x)[i]
    return (<const uint16_t*>x)[i] if image.dtype == FASTBN_UINT16 else (<const int16_t*>x)[i]


cdef void keep_by_mask(const Image* image, const Panel* panel, char* keep) noexcept nogil:
    # All bits of what counts. Channels have the mask in common.
    cdef Py_ssize_t r, size = bits_of_type(image.dtype) // 8
    cdef Py_ssize_t row = other_row_step(image), column = other_column_step(image)
    if panel.other == NULL:
        memset(keep, 255, panel.rows * panel.columns * size)
    elif channels_in_columns(image):
        spread_mask(<const uint8_t*>panel.other, row, panel.rows, panel.columns * size,
                    <uint8_t*>keep)
    else:
        for r in range(panel.rows):
            spread_mask(<const uint8_t*>panel.other + r * row, column, panel.columns, size,
                        <uint8_t*>keep + r * panel.columns * size)


cdef void drop_nodata(const Image* image, const Panel* panel, const char* x,
                      char* keep) noexcept nogil:
    cdef Py_ssize_t size = bits_of_type(image.dtype) // 8, i = 0, r, c
    cdef Py_ssize_t step = image.channel_step if channels_in_columns(image) else 0
    cdef const int32_t* numbers
    if image.nodata == NULL:
        return
    numbers = image.nodata + image.first_channel + panel.channel * image.channel_step
    for r in range(panel.rows):
        for c in range(panel.columns):
            if number_at(image, x, i) == numbers[c * step]:
                memset(keep + i * size, 0, size)
            i += 1


cdef void count_kept(const Image* image, const Panel* panel, const char* keep,
                     Total* totals) noexcept nogil:
    cdef Py_ssize_t size = bits_of_type(image.dtype) // 8, i = 0, r, c, marks
    if not channels_in_columns(image):
        total_at(image, totals, panel.channel).count += count_marks(
            <const uint8_t*>keep, panel.columns, size)
        return
    if image.nodata == NULL:        # the channels have them in common
        marks = count_marks(<const uint8_t*>keep, panel.rows * panel.columns, size)
        for c in range(panel.columns):
            total_at(image, totals, panel.channel + c).count += marks // panel.columns
        return
    for r in range(panel.rows):
        for c in range(panel.columns):
            total_at(image, totals, panel.channel + c).count += keep[i * size] != 0
            i += 1


cdef void count_all(const Image* image, const Panel* panel, Total* totals) noexcept nogil:
    cdef Py_ssize_t c
    if not channels_in_columns(image):
        total_at(image, totals, panel.channel).count += panel.rows * panel.columns
        return
    for c in range(panel.columns):
        total_at(image, totals, panel.channel + c).count += panel.rows


# ---- sums of a panel -----------------------------------------------------------------

cdef void add_run(const Image* image, const char* x, const char* keep, Py_ssize_t n,
                  Py_ssize_t channel, Total* totals) noexcept nogil:
    cdef int bits = bits_of_type(image.dtype)
    cdef Sums sums = no_sums(bits)
    if bits == 8:
        run8(<const uint8_t*>x, <const uint8_t*>keep, n, flip_of(image.dtype), &sums)
    else:
        run16(<const uint16_t*>x, <const uint16_t*>keep, n, flip_of(image.dtype), &sums)
    add_to_total(total_at(image, totals, channel), &sums)


cdef void add_thirds(const Image* image, const char* x, const char* keep, Py_ssize_t n,
                     Total* totals) noexcept nogil:
    cdef int bits = bits_of_type(image.dtype), c
    cdef Sums sums[3]
    for c in range(3):
        sums[c] = no_sums(bits)
    if bits == 8:
        thirds8(<const uint8_t*>x, <const uint8_t*>keep, n, flip_of(image.dtype), sums)
    else:
        thirds16(<const uint16_t*>x, <const uint16_t*>keep, n, flip_of(image.dtype), sums)
    for c in range(3):
        add_to_total(total_at(image, totals, c), &sums[c])


cdef void add_marked(const Image* image, const Panel* panel, Total* totals) noexcept nogil:
    # A run of one channel, or of three by turns, of which the mask says what counts.
    cdef const uint8_t* x = <const uint8_t*>panel.x
    cdef const uint8_t* mask = <const uint8_t*>panel.other
    cdef Sums sums[3]
    cdef Total* total
    cdef Py_ssize_t count
    cdef int c, channels = 3 if channels_in_columns(image) else 1, flip = flip_of(image.dtype)
    for c in range(3):
        sums[c] = no_sums(8)
    if channels == 3:
        count = marked_thirds8(x, mask, panel.rows, flip, sums)
    else:
        count = marked_run8(x, mask, panel.columns, flip, sums)
    for c in range(channels):
        total = total_at(image, totals, panel.channel + c)
        total.count += count
        add_to_total(total, &sums[c])


cdef void add_columns(const Image* image, const char* x, const char* keep, Py_ssize_t rows,
                      Py_ssize_t columns, Py_ssize_t step, const Panel* panel,
                      Total* totals) noexcept nogil:
    # A multiple of the panel's columns: some pixels side by side.
    cdef int bits = bits_of_type(image.dtype)
    cdef Sums sums[MOST_COLUMNS]
    cdef Py_ssize_t i
    if bits == 8:
        columns8(<const uint8_t*>x, <const uint8_t*>keep, rows, columns, step,
                 flip_of(image.dtype), sums)
    else:
        columns16(<const uint16_t*>x, <const uint16_t*>keep, rows, columns, step,
                  flip_of(image.dtype), sums)
    for i in range(columns):
        add_to_total(total_at(image, totals, panel.channel + i % panel.columns), &sums[i])


cdef void add_rows(const Image* image, const char* x, const char* keep, Py_ssize_t step,
                   const Panel* panel, Total* totals) noexcept nogil:
    # Rows of channels, `step` elements apart.
    cdef Py_ssize_t size = bits_of_type(image.dtype) // 8, rows = panel.rows, some, at, i
    cdef Py_ssize_t pixels = 1, register = REGISTER_BYTES // size
    if step == panel.columns:       # without gaps: fill one register, or nearly all of some
        if register % panel.columns != 0:
            register = FULL_COLUMNS
        pixels = maximum(1, minimum(rows, register // panel.columns))
    for i in range(ceil_div(rows // pixels, MOST_ROWS)):
        some = minimum(MOST_ROWS, rows // pixels - i * MOST_ROWS)
        at = i * MOST_ROWS * pixels * step * size
        add_columns(image, x + at, keep + at if keep != NULL else NULL, some,
                    pixels * panel.columns, pixels * step, panel, totals)
    if rows % pixels:
        at = rows // pixels * pixels * step * size
        add_columns(image, x + at, keep + at if keep != NULL else NULL, 1,
                    rows % pixels * panel.columns, 0, panel, totals)


cdef void add_panel(const Image* image, const Panel* panel, Total* totals) noexcept nogil:
    cdef char gathered[MOST_BYTES]
    cdef char kept[MOST_BYTES + SPREAD_BYTES]
    cdef const char* x = panel.x
    cdef const char* keep = NULL
    cdef Py_ssize_t step = row_step(image), n = panel.rows * panel.columns
    cdef bint gaps = panel.rows > 1 and step != panel.columns
    cdef bint narrow = image.nest.size[image.nest.ndim - 1] < FULL_ROW
    if image.marked:
        add_marked(image, panel, totals)
        return
    if column_step(image) != 1 or (gaps and (chooses(image) or narrow)):
        gather(bits_of_type(image.dtype) // 8, x, panel.rows, panel.columns, step,
               column_step(image), gathered)
        x, step = gathered, panel.columns
    if chooses(image):
        keep_by_mask(image, panel, kept)
        drop_nodata(image, panel, x, kept)
        count_kept(image, panel, kept, totals)
        keep = kept
    else:
        count_all(image, panel, totals)
    if not channels_in_columns(image):
        add_run(image, x, keep, n, panel.channel, totals)
    elif panel.columns == 3 and image.channels == 3 and step == 3:
        add_thirds(image, x, keep, n, totals)
    else:
        add_rows(image, x, keep, step, panel, totals)


cdef void add_sums(const Image* image, Py_ssize_t begin, Py_ssize_t end,
                   int worker) noexcept nogil:
    cdef Total* totals = totals_of(image, worker)
    cdef Py_ssize_t size = bits_of_type(image.dtype) // 8, i
    cdef Panel panel
    for i in range(begin * image.task_panels, minimum(end * image.task_panels, image.panels)):
        panel = panel_at(image, i, size, 1)
        add_panel(image, &panel, totals)


# ---- what they come to ---------------------------------------------------------------

cdef void put_number(int dtype, void* to, Py_ssize_t i, int number) noexcept nogil:
    if to == NULL:
        return
    if bits_of_type(dtype) == 8:
        (<uint8_t*>to)[i] = <uint8_t>number
    else:
        (<uint16_t*>to)[i] = <uint16_t>number


cdef void merge_sums(const Image* image, Py_ssize_t begin, Py_ssize_t end,
                     int worker) noexcept nogil:
    # Of channels [begin, end).
    cdef fp_state saved = fp_enter()
    cdef Py_ssize_t c
    cdef int k
    cdef Total total
    cdef Result result
    for c in range(begin, end):
        total = totals_of(image, 0)[c]
        for k in range(1, <int>image.workers):
            join_totals(&total, totals_of(image, k) + c)
        result = result_of(&total, offset_of(image.dtype), image.repeats)
        image.mean[c], image.m2[c] = result.mean, result.m2
        put_number(image.dtype, image.minimum, c, result.low)
        put_number(image.dtype, image.maximum, c, result.high)
        if image.sums != NULL:
            image.sums[4 * c], image.sums[4 * c + 1] = result.sum, result.more_sum
            image.sums[4 * c + 2] = <int64_t>result.squares
            image.sums[4 * c + 3] = <int64_t>result.more_squares
            image.counts[c] = result.count
    fp_leave(saved)

# SPDX-License-Identifier: BSD-3-Clause
# normalize and denormalize: panel by panel, elements of one type and layout become those of
# another. What is not a run of neighbours in x is gathered first, and what is none in `out`
# is scattered at last.
#
# May: convert. May not: sum.

cdef enum:
    SPLIT_KINDS = 4


cdef void repeat_in_table(const Image* image) noexcept nogil:
    # Behind the channels' coefficients, the same again, for rows of channels.
    cdef Py_ssize_t i, kind
    cdef double* k
    cdef float* part
    for kind in range(CONVERSION_KINDS):
        k = image.coefficients + kind * image.table
        for i in range(image.channels, image.table):
            k[i] = k[i - image.channels]
    for kind in range(SPLIT_KINDS if image.split else 0):
        part = image.splits + kind * image.table
        for i in range(image.channels, image.table):
            part[i] = part[i - image.channels]


cdef void fill_coefficients(Image* image) noexcept nogil:
    cdef fp_state saved = fp_enter()
    cdef Py_ssize_t i, c, n = image.table
    cdef double* k
    cdef Split split
    image.exact = image.out_dtype == FASTBN_FLOAT64
    image.split = (image.dtype >= FASTBN_UINT8 and not image.inverse
                   and image.out_dtype != FASTBN_FLOAT64)
    for i in range(image.channels):
        c = image.first_channel + i * image.channel_step
        k = image.coefficients + i
        conversion_of(image.norm_mean[c], image.norm_std[c], image.max_value, image.inverse, k, n)
        image.exact &= is_usual(k, n)
        image.split &= can_split(k, n)
    for i in range(image.channels if image.split else 0):
        split = split_of(image.coefficients + i, n)
        image.splits[i], image.splits[n + i] = split.first, split.rest
        image.splits[2 * n + i], image.splits[3 * n + i] = split.shift, <float>split.mean
    if channels_in_columns(image):
        repeat_in_table(image)
    fp_leave(saved)


cdef inline Split split_at_channel(const Image* image, Py_ssize_t c) noexcept nogil:
    cdef const float* k = image.splits + c
    cdef Split split
    split.first, split.rest, split.shift = k[0], k[image.table], k[2 * image.table]
    split.mean = <int32_t>k[3 * image.table]
    return split


cdef void convert_split(const Image* image, const char* x, Py_ssize_t n, Py_ssize_t channel,
                        char* to) noexcept nogil:
    # Integers of one channel to a float type of at most 32 bits.
    cdef Split split = split_at_channel(image, channel)
    if image.out_dtype == FASTBN_FLOAT32:
        split_as[image.dtype](x, n, split, <float*>to)
    elif image.out_dtype == FASTBN_FLOAT16:
        split_to_float16_as[image.dtype](x, n, split, <uint16_t*>to)
    else:
        split_to_bfloat16_as[image.dtype](x, n, split, <uint16_t*>to)


cdef void convert_splits(const Image* image, const char* x, Py_ssize_t n, Py_ssize_t channel,
                         char* to) noexcept nogil:
    # The same of channels side by side.
    cdef PieceMemory scratch
    cdef bint wide = image.out_dtype == FASTBN_FLOAT32
    cdef float* y = <float*>to if wide else <float*>scratch.bytes
    splits_as[image.dtype](x, n, image.splits + channel, image.table, y)
    if image.out_dtype == FASTBN_FLOAT16:
        floats_to_float16(y, <uint16_t*>to, n)
    elif not wide:
        floats_to_bfloat16(y, <uint16_t*>to, n)


cdef void convert_piece(const Image* image, const char* x, Py_ssize_t n, Py_ssize_t channel,
                        bint by_channel, char* to) noexcept nogil:
    cdef PieceMemory scratch
    cdef double* some = <double*>scratch.bytes
    if image.split:
        if by_channel:
            convert_splits(image, x, n, channel, to)
        else:
            convert_split(image, x, n, channel, to)
        return
    unpack_as[image.dtype](x, n, some)
    apply(some, n, image.coefficients + channel, image.table, by_channel, image.exact)
    pack_as[image.out_dtype](some, n, to)


cdef inline bint splits_past_cache(const Image* image, bint by_channel) noexcept nogil:
    # Without a line in between.
    return (image.split and not by_channel and image.out_dtype == FASTBN_FLOAT32
            and split_past_cache_as[image.dtype] != NULL)


cdef void convert_run(const Image* image, const char* x, Py_ssize_t n, Py_ssize_t channel,
                      bint by_channel, char* to, bint streaming) noexcept nogil:
    # n neighbours on both sides, of one channel, or each of the one after: after the last
    # in the table comes the first.
    cdef PieceMemory line
    cdef Py_ssize_t size = size_of_type[image.dtype], out_size = size_of_type[image.out_dtype]
    cdef Py_ssize_t i = 0, some, most
    cdef size_t before      # bytes up to the end of a line, if one has begun
    while i < n:
        most = TABLE
        before = (0 - <size_t>(to + i * out_size)) % CACHE_LINE
        if by_channel:
            most = image.table - channel
        elif before > 0:
            most = before // out_size
        some = minimum(n - i, minimum(most, TABLE))
        if streaming and before == 0 and splits_past_cache(image, by_channel):
            split_past_cache_as[image.dtype](x + i * size, some, split_at_channel(image, channel),
                                             <float*>(to + i * out_size))
        elif streaming:
            convert_piece(image, x + i * size, some, channel, by_channel, line.bytes)
            copy_past_cache(to + i * out_size, line.bytes, some * out_size)
        else:
            convert_piece(image, x + i * size, some, channel, by_channel, to + i * out_size)
        i += some
        if by_channel:
            channel = (channel + some) % image.table
            if channel >= image.channels:
                channel %= image.channels


cdef void convert_rows(const Image* image, const Panel* panel, const char* x, Py_ssize_t step,
                       char* to, Py_ssize_t to_step, bint streaming) noexcept nogil:
    # Rows without gaps in themselves; one run, if there are none between them either.
    cdef Py_ssize_t size = size_of_type[image.dtype], out_size = size_of_type[image.out_dtype]
    cdef bint by_channel = channels_in_columns(image)
    cdef Py_ssize_t r, in_rows = channels_in_rows(image)
    if not in_rows and step == panel.columns and to_step == panel.columns and (
            not by_channel or panel.columns == image.channels):
        convert_run(image, x, panel.rows * panel.columns, panel.channel, by_channel, to, streaming)
        return
    for r in range(panel.rows):
        convert_run(image, x + r * step * size, panel.columns, panel.channel + r * in_rows,
                    by_channel, to + r * to_step * out_size, streaming)


cdef inline bint needs_gathering(const Image* image) noexcept nogil:
    return column_step(image) != 1 and image.nest.size[image.nest.ndim - 1] > 1


cdef inline bint needs_scattering(const Image* image) noexcept nogil:
    # Not where rows are worth a run of their own.
    cdef Py_ssize_t columns = image.nest.size[image.nest.ndim - 1]
    return other_column_step(image) != 1 or (
        channels_in_columns(image) and columns < 32 and other_row_step(image) != columns)


cdef void convert_panel(const Image* image, const Panel* panel) noexcept nogil:
    cdef PanelMemory gathered, scattered
    cdef const char* x = panel.x
    cdef Py_ssize_t step = row_step(image)
    cdef bint scatters = needs_scattering(image)
    if needs_gathering(image) or (scatters and step != panel.columns):
        gather(size_of_type[image.dtype], x, panel.rows, panel.columns, step, column_step(image),
               gathered.bytes)
        x, step = gathered.bytes, panel.columns
    if not scatters:
        convert_rows(image, panel, x, step, panel.other, other_row_step(image), image.streaming)
        return
    convert_rows(image, panel, x, step, scattered.bytes, panel.columns, False)
    scatter(size_of_type[image.out_dtype], panel.other, panel.rows, panel.columns,
            other_row_step(image), other_column_step(image), scattered.bytes)


cdef void convert(const Image* image, Py_ssize_t begin, Py_ssize_t end,
                  int worker) noexcept nogil:
    cdef fp_state saved = fp_enter()
    cdef Py_ssize_t i
    cdef Panel panel
    for i in range(begin * image.task_panels, minimum(end * image.task_panels, image.panels)):
        panel = panel_at(image, i, size_of_type[image.dtype], size_of_type[image.out_dtype])
        convert_panel(image, &panel)
    if image.streaming:
        end_past_cache()
    fp_leave(saved)

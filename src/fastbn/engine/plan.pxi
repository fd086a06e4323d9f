# SPDX-License-Identifier: BSD-3-Clause
# A problem -> a plan: tiles of channels, blocks of runs, segments of blocks. By shape alone,
# as far as bits follow from it. May not look at memory. A part of core.pyx.

cdef enum:
    # Elements. With those of problem.pxd they decide the order of additions: to
    # change one is to change results.
    BLOCK = 16384               # a block stays in L2 while it is worked on ...
    BLOCK_OF_ROWS = 32768       # ... and is worth what it costs by itself
    SEGMENT = 65536             # a task is worth waking a thread for
    LONGEST_SHORT_RUN = 128     # longer runs are cut into rows of RUN_COLUMNS ...
    LONGEST_OF_FEW = 32         # ... and so are those longer than this, if they are few
    FEW_RUNS = 16
    NEIGHBOURS = 2048           # elements of long runs that are read in one go, ...
    NEIGHBOURING_BYTES = 8192   # ... or so many bytes, if that is more
    LONG_FEATURES = 32768       # elements of a tile whose runs have features
    FEWEST_BLOCK_ROWS = 128
    BLOCK_ROWS_UNIT = 16        # blocks of rows have a multiple of so many
    WORTH_TWO_SHARES = 1 << 16  # gradients of features are summed in shares of the rows
    MOST_SHARES = 64
    # Bytes. These decide speed only.
    CACHE_OF_A_TILE = 4 << 20       # a tile is read again from the cache up to here ...
    CACHE_OF_ROWS = 1 << 20         # ... or here, where it is rows, or a piece of each
    CACHE_OF_GROUPS = 256 << 10     # groups of planes, whose output follows statistics
    CACHE = 32 << 20                # outputs of calls with larger tensors go past it
    CACHE_OF_ONE = 20 << 20         # the same for one thread, which gains less from it
    WORK_OF_A_CHANNEL = 256         # of rows, on one thread, takes as long as so much data


cdef inline Py_ssize_t even_share(Py_ssize_t n, Py_ssize_t most, Py_ssize_t unit) noexcept nogil:
    # n cut into shares of at most about `most`, alike, each a multiple of `unit`.
    return ceil_div(ceil_div(n, ceil_div(n, most)), unit) * unit


cdef Py_ssize_t channels_of_a_tile(const View* view, Py_ssize_t elem_size,
                                   bint long_runs) noexcept nogil:
    cdef Py_ssize_t neighbours = maximum(NEIGHBOURS, NEIGHBOURING_BYTES // elem_size)
    if view.features:
        return minimum(view.channels, maximum(1, minimum(COLUMNS // RUN_COLUMNS,
                                                         LONG_FEATURES // view.inner)))
    if long_runs:
        return minimum(minimum(view.channels, ceil_div(neighbours, view.inner)),
                       COLUMNS // RUN_COLUMNS)
    return minimum(view.channels, COLUMNS // view.inner)


cdef void cut(const View* view, Py_ssize_t elem_size, Plan* p) noexcept nogil:
    cdef Py_ssize_t runs = view.outer * view.middle
    if runs == 0:       # nothing to do
        p.long_runs = False
        p.pixels = p.tile_channels = p.block_runs = p.block_length = p.parts = 1
        p.tiles = p.blocks = p.segments = 0
        p.segment_blocks = 1
        return
    p.long_runs = (view.features or view.inner > LONGEST_SHORT_RUN
                   or (view.inner > LONGEST_OF_FEW and runs < FEW_RUNS))
    p.pixels = PIXELS if view.inner == 1 and view.channels < PIXELS and not p.long_runs else 1
    p.tile_channels = channels_of_a_tile(view, elem_size, p.long_runs)
    if p.long_runs:
        p.block_runs = even_share(runs, maximum(1, BLOCK // (view.inner * p.tile_channels)), 1)
        p.block_length = even_share(view.inner, BLOCK, RUN_COLUMNS)
    else:
        p.block_runs = even_share(
            runs, maximum(BLOCK_OF_ROWS // (p.tile_channels * view.inner), FEWEST_BLOCK_ROWS),
            BLOCK_ROWS_UNIT)
        p.block_length = view.inner
    p.tiles = ceil_div(view.channels, p.tile_channels)
    p.parts = ceil_div(view.inner, p.block_length)
    p.blocks = ceil_div(runs, p.block_runs) * p.parts
    p.segment_blocks = maximum(
        1, SEGMENT // (p.block_runs * minimum(p.block_length, view.inner) * p.tile_channels))
    p.segments = ceil_div(p.blocks, p.segment_blocks)


cdef inline Py_ssize_t values_of_a_channel(const View* view) noexcept nogil:
    return view.outer * view.middle * view.inner


cdef inline size_t count_elements(const Problem* p) noexcept nogil:
    return <size_t>values_of_a_channel(&p.view) * p.view.channels * p.instances


cdef inline Py_ssize_t numbers_of_a_share(const Problem* p) noexcept nogil:
    return 2 * (p.view.inner + WRAP)


cdef Py_ssize_t count_shares(const Problem* problem, const Plan* plan) noexcept nogil:
    # As many as fit into a sixteenth of the tensor; two, if it is worth a thread.
    cdef Py_ssize_t n = count_elements(problem)
    cdef Py_ssize_t least = 2 if n >= WORTH_TWO_SHARES else 1
    cdef Py_ssize_t most = minimum(MOST_SHARES, plan.tiles)
    return minimum(most, maximum(least, n // (4 * numbers_of_a_share(problem)
                                              * <Py_ssize_t>sizeof(double))))


cdef void split_instances(Problem* p, Py_ssize_t elem_size) noexcept nogil:
    # Planes of an instance into parts, each some groups that stay in the cache between
    # statistics and output.
    cdef Py_ssize_t groups = p.view.channels // p.group, some
    if p.group == 1 or p.view.outer * p.view.middle != 1:
        return
    some = maximum(1, minimum(groups, CACHE_OF_GROUPS // (p.view.inner * p.group * elem_size)))
    while groups % some:
        some -= 1
    p.channel_parts = groups // some
    p.instances *= p.channel_parts
    p.view.channels //= p.channel_parts


cdef inline bint in_sequence(const Request* r) noexcept nogil:
    # All threads to each instance, where instances are few; else an instance to each thread.
    return 1 < r.job.problem.instances < 2 * r.workers


cdef inline int workers_of_an_instance(const Request* r) noexcept nogil:
    return r.workers if r.job.problem.instances == 1 or in_sequence(r) else 1


cdef bint fits_cache_by_tile(const Request* r) noexcept nogil:
    # Statistics and output of a tile together, so that its second reading comes from the
    # cache; not where whole phases share out better.
    cdef const Plan* plan = &r.job.plan
    cdef int workers = workers_of_an_instance(r)
    cdef int tensors = 1 if not is_backward(&r.call) else 4 if plan.dz_first else 2
    cdef size_t tile = (<size_t>values_of_a_channel(&r.job.problem.view) * plan.tile_channels
                        * r.kernels.elem_size * tensors)
    return (tile <= <size_t>(CACHE_OF_A_TILE if r.job.problem.view.inner > 1 else CACHE_OF_ROWS)
            and (workers == 1 or plan.tiles >= 2 * workers))


cdef void plan_groups(Request* r) noexcept nogil:
    # The problem of the same statistics for which a group is a channel.
    r.group_job.problem = r.job.problem
    r.group_job.problem.group = 1
    r.group_job.problem.view.channels //= r.job.problem.group
    r.group_job.problem.view.inner *= r.job.problem.group
    r.group_job.plan = r.job.plan
    cut(&r.group_job.problem.view, r.kernels.elem_size, &r.group_job.plan)


cdef inline int count_tensors(const fastbn_call* call) noexcept nogil:
    # That are read or written.
    return 1 if call.operation == FASTBN_STATISTICS else 3 if is_backward(call) else 2


cdef void make_plan(Request* r) noexcept nogil:
    cdef Plan* plan = &r.job.plan
    split_instances(&r.job.problem, r.kernels.elem_size)
    cut(&r.job.problem.view, r.kernels.elem_size, plan)
    plan.shares = count_shares(&r.job.problem, plan) if r.job.problem.view.features else 0
    plan.bytes = count_elements(&r.job.problem) * r.kernels.elem_size
    cdef size_t whole = plan.bytes if r.extras.whole <= plan.bytes else r.extras.whole
    plan.streaming = whole * count_tensors(&r.call) >= <size_t>(
        CACHE if r.workers > 1 else CACHE_OF_ONE)
    plan.by_tile = (r.job.problem.view.features and is_backward(&r.call)) or (
        r.job.problem.group == 1 and r.job.problem.training and not r.extras.part
        and r.call.operation != FASTBN_INFERENCE and fits_cache_by_tile(r))
    plan.fetch_next = plan.by_tile and plan.streaming
    if r.job.problem.group > 1:
        plan_groups(r)


cdef Py_ssize_t work_of(const Request* r) noexcept nogil:
    # Bytes of x, as often as it is read.
    cdef Py_ssize_t readings = 1 if r.call.operation in (
        FASTBN_STATISTICS, FASTBN_INFERENCE) else 2
    cdef Py_ssize_t bytes
    if is_image(&r.call):
        return bytes_of_image(r)
    bytes = count_elements(&r.job.problem) * r.kernels.elem_size
    if r.call.norm == FASTBN_BATCH_NORM and r.job.problem.view.inner == 1:
        bytes -= WORK_OF_A_CHANNEL * r.job.problem.view.channels
    return readings * bytes

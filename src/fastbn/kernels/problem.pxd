# SPDX-License-Identifier: BSD-3-Clause
"""What the engine tells kernels: a problem, its plan, the buffers. Declarations only.

    problem   what was asked: sizes, norm, activation
    plan      how it is cut, and how it is written
    buffers   where memory is

An instance, a group of channels, a share of rows has buffers of its own; the problem
and the plan are those of all. None of it is a Python object, so that a kernel can run
on any thread of any thread pool.
"""

cdef enum:
    MAX_WIDTH = 16              # numbers in the widest register of any level
    COLUMNS = 512               # columns of a tile, at most: its sums stay in L1
    RUN_COLUMNS = MAX_WIDTH     # a long run is read as a matrix of so many columns
    PIXELS = MAX_WIDTH          # so many pixels of fewer channels make a row of a matrix
    WRAP = MAX_WIDTH            # so many coefficients follow those of the channels
    PROBES = 5                  # the pivot is the median of so many elements of a block
    MASK_PADDING = 64           # bytes behind those of a mask: registers reach past its end

cdef enum:
    POW2_SCALE, PIVOT, SCALE, SHIFT, SLOPE, OFFSET, COEFFICIENT_KINDS

ctypedef struct View:
    # A channel is outer * middle runs of `inner` neighbouring elements.
    # inner > 1 is called planes (NCHW), inner == 1 rows (NHWC).
    Py_ssize_t outer
    Py_ssize_t middle
    Py_ssize_t channels
    Py_ssize_t inner
    bint features               # weight and bias belong to elements of a run: layer norm

ctypedef struct Problem:
    # The tensor is `instances` times the view, each with statistics of its own.
    View view
    Py_ssize_t instances
    Py_ssize_t channel_parts    # instances that make one along `Operand.instance`
    Py_ssize_t group            # channels that have their statistics in common
    Py_ssize_t period           # of features: channels in each step of `Operand.outer`
    bint centred                # else statistics are around 0: RMS norm
    bint training               # backward: gradient through the statistics
    bint inverted               # backward: x is the y of an activation that has an inverse
    int activation              # of fastbn.h
    double negative_slope       # of leaky ReLU
    double eps
    double momentum
    double total                # values of a channel, of which x is a part; 0: x is all

ctypedef struct Plan:
    # How the view is cut: by itself and the size of an element alone, since the order
    # of additions, and with it every bit of the result, follows from the cut.
    bint long_runs              # runs are cut into columns
    Py_ssize_t pixels           # inner == 1: runs in a row of the matrix of sums
    Py_ssize_t tile_channels    # channels that are worked on together
    Py_ssize_t tiles
    Py_ssize_t block_runs       # runs in a block ...
    Py_ssize_t block_length     # ... and how much of each run
    Py_ssize_t parts            # blocks that a run is cut into
    Py_ssize_t blocks
    Py_ssize_t segment_blocks   # blocks that one task sums up
    Py_ssize_t segments
    Py_ssize_t shares           # of the rows, for gradients of features
    # How it is written. The bits do not follow from this.
    size_t bytes                # of the tensor
    bint fused                  # the passes over x have an activation or a residual
    bint dz_first               # backward: dz is written before it is summed, in place of dy
    bint streaming              # `out` goes past the cache
    bint by_tile                # all of a tile is done before the next one ...
    bint fetch_next             # ... which is fetched while the one before is written

ctypedef struct Operand:
    # Where the elements of one tensor are. Strides are in elements and may be
    # negative or zero; `inner` has stride 1, which is why it is not here.
    void* data
    Py_ssize_t instance
    Py_ssize_t outer
    Py_ssize_t middle
    Py_ssize_t channel

ctypedef struct BlockMask:
    # The positions of a block that count. A position is run * length + offset.
    Py_ssize_t count
    Py_ssize_t probes[PROBES]   # the first, some between at even distances, and the last

ctypedef struct Mask:
    # The positions that count, those of all channels alike.
    const signed char* bytes    # all bits of one or none, for each position; NULL: all count
    Py_ssize_t period           # positions of a run; those of a group of channels repeat them
    Py_ssize_t count            # how many count ...
    Py_ssize_t first            # ... and the first that does, if any
    const BlockMask* blocks     # of the plan ...
    const BlockMask* group_blocks   # ... and of that for which a group is a channel
    # Of each part of a long run: how many count, if they are its first; else -1. NULL: unknown.
    const Py_ssize_t* prefixes
    const Py_ssize_t* counts    # `count` and `first` of each instance
    const Py_ssize_t* firsts

ctypedef struct WrittenMask:
    # Of a part of what is written, in the order of memory: zeros go where a byte is 0.
    const signed char* bytes    # NULL: nowhere
    const void* start           # the element of the first

ctypedef struct Buffers:
    Operand x
    Operand dy                  # or dz, the gradient before the activation, with `dz_first`:
    Operand dy_of_y             # then this is dy
    Operand out
    Operand residual            # added before the activation; data NULL: there is none
    # float64 vectors; of (instances, channels) or of (instances, groups) are the statistics
    # and gradients, of channels the others. NULL: absent (weight 1, bias 0).
    const double* weight
    const double* bias
    double* mean
    double* m2                  # m2, var and invstd may be one
    double* var                 # NULL: invstd is given
    double* invstd
    double* minimum             # of statistics; NULL: not wanted
    double* maximum
    double* running_mean        # updated in training; NULL: not kept
    double* running_var
    double* dweight
    double* dbias
    # Where channels are in groups, these are their statistics; mean and invstd, then in
    # the workspace, repeat them for each channel.
    double* group_mean
    double* group_invstd
    # Of features: weight and bias as the kernel's `real`, in the caller's memory, if they
    # are so there, whole registers of them; else in `features`, (2, inner + WRAP) of them.
    const void* real_weight
    const void* real_bias
    void* features
    # float64 gradients of each channel, and (shares, 2, inner + WRAP) sums over some
    # neighbouring channels.
    double* run_sums
    double* feature_sums
    # Workspace: two float64 arrays of (segments, channels), and
    # (COEFFICIENT_KINDS, channels + WRAP) numbers of the kernel's `real`.
    double* partial[2]
    void* coefficients
    double* low                 # extremes, of (segments, channels)
    double* high
    Mask mask
    WrittenMask written_mask

ctypedef struct Job:
    Problem problem
    Plan plan
    Buffers buffers

# The task of a tile kernel is a rectangle: tiles [t0, t1) x segments or blocks [b0, b1).
ctypedef void (*TileKernel)(const Job* job, Py_ssize_t t0, Py_ssize_t t1, Py_ssize_t b0,
                            Py_ssize_t b1) noexcept nogil
# A channel kernel works on the vectors of channels [c0, c1).
ctypedef void (*ChannelKernel)(const Job* job, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil
# Vectors of n elements, to float64 and back.
ctypedef void (*ToFloat64)(const void* vector, Py_ssize_t n, double* to) noexcept nogil
ctypedef void (*FromFloat64)(const double* vector, Py_ssize_t n, void* to) noexcept nogil

ctypedef struct ActivationTraits:
    bint dz_first                   # backward writes its gradient before it sums

ctypedef struct KernelTable:
    # The kernels of one CPU level and one element type.
    size_t elem_size
    size_t real_size
    int activation_count            # numbers of fastbn.h, from 0 on
    const ActivationTraits* activations
    TileKernel moments              # (count, mean, M2) of each channel and segment
    ChannelKernel merge_moments     # -> mean, m2, var
    TileKernel extremes             # low, high of each channel and segment
    ChannelKernel merge_extremes    # -> minimum, maximum
    ChannelKernel update_running    # running_mean, running_var
    ChannelKernel broadcast_groups  # group_mean, var or group_invstd -> mean, invstd of channels
    ChannelKernel broadcast_features  # weight, bias -> features
    ChannelKernel coefficients      # mean, var or invstd, weight, bias -> coefficients
    TileKernel write_forward        # out = (x - mean) * invstd * weight + bias
    TileKernel gradient_sums        # sum dy and sum dy * (x - mean) of each channel and segment
    ChannelKernel merge_gradients   # -> dbias, dweight, coefficients
    ChannelKernel batch_coefficients        # dbias, dweight of all -> coefficients
    TileKernel write_gradient       # out = dx; with features, their sums of gradients, too
    TileKernel write_dz             # dy = dz, from dy_of_y
    ChannelKernel add_instances     # dweight, dbias of the first instance become those of all
    ToFloat64 to_float64
    FromFloat64 from_float64

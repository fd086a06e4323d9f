# SPDX-License-Identifier: BSD-3-Clause
"""The map of fastbn: how a call becomes arithmetic.

    functional/, layers/, stats.py      names, defaults, documentation; sync/: other processes
            |
    _numpy/         arrays -> a call; faults -> exceptions
    torch/          tensors -> a call                   (C and C++ fill one themselves)
            |
    include/fastbn.h        the call: the one descriptor, the only enums
            |
    engine/core.pyx         a call -> a request: problem, plan, buffers
        checks, overlap         what can be wrong, and with which argument
        axes                    axes -> a view
        plan                    how the view is cut, by shape alone
        buffers, vectors        where memory is; that of an instance
        images                  calls that are no view: integers, other layouts
        phases                  what is done, in which order: tasks
        threads, api            by whom: OpenMP's threads, or the caller's
            |
    kernels/kernels.pxi     tasks -> numbers, in registers (simd.h)
        geometry, activations                   where numbers lie; what follows them
        inputs, rowgroups, columns, reduce_*    sums of rows and columns
        coefficients, merging, moments, gradients   statistics, and what passes need of them
        operands, tables, elementwise           one register of a write
        write_*, writes                         walks through what is written
        vectors                                 parameters <-> float64
    kernels/images.pxi      the same for integers, and for other layouts

Calls go down only. A layer knows the one below it and nothing above.

1.  A tensor is a view (outer, middle, channels, inner), whatever its layout:
    NCHW is (1, N, C, H*W), "planes"; NHWC is (1, N*H*W, C, 1), "rows".
2.  The engine is told a problem, makes a plan of it, and gets buffers (problem.pxd). The plan
    cuts the view into tiles of channels and segments of runs, by its four sizes and that of an
    element. What is summed in which order follows from that cut, so results have the same bits
    on any number of threads.
3.  Kernels are serial functions without Python. They are compiled once for each CPU level and
    element type, from one source; the engine reaches them through a `KernelTable`.
4.  The other norms are views. Layer and RMS norm: a row is a channel, with features. Instance
    norm: each instance has buffers of its own. Group norm: for statistics, a group is a channel.
5.  An activation or a residual is part of a write, and of the sums of backward. With a
    residual, or an activation whose slope is dear, backward writes the gradient before the
    activation first.
6.  All checks of sizes, strides, numbers and overlap are the engine's. It answers with a code
    and the argument at fault; each binding says it in its host's words.
7.  library.pyx and linked.pyx are the engine and the kernels for a library without Python.

docs/design.md has the reasons, and where a new option has to go.
"""

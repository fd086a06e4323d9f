# SPDX-License-Identifier: BSD-3-Clause
"""The kernels: how a call becomes arithmetic.

    functional/, layers/        names, defaults, documentation
            |
        _view.pyx, view/        checks everything; arrays -> Job (job.pxd)
            |
        axes.pxi                axes -> View
            |
        drivers.pyx             Job -> Plan
        workspace.pxi           memory; jobs that a job consists of
        phases.pxi              Plan -> phases of tasks
        team.pxi                tasks, shared out to threads
            |
        kernels.pxi             tasks -> numbers, in registers (simd.h); its first lines
                                have the map of its fragments

Calls go down only. A room knows the one below it and nothing above.

1.  A tensor is a view (outer, middle, channels, inner), whatever its layout:
    NCHW is (1, N, C, H*W), "planes"; NHWC is (1, N*H*W, C, 1), "rows".
2.  A driver cuts the view into tiles of channels and segments of runs, by its
    four sizes and that of an element. What is summed in which order follows from
    that cut, so results have the same bits on any number of threads.
3.  Kernels are serial functions without Python. They are compiled once for each
    CPU level and element type, from one source; the drivers reach them through
    a table of pointers (`KernelTable`).
4.  Siblings are views. Layer and RMS norm: a row is a channel, with features.
    Instance norm: each instance is a job. Group norm: for statistics, a group is a
    channel. Each has what it alone needs in a function or two of the kernels.
5.  An activation or a residual is part of a write, and of the sums of backward. With a
    residual, or SiLU, backward writes the gradient before the activation first.
6.  C comes in beside the view: call.pxi makes a Job of a call of fastbn.h, and api.pxi
    has a caller's threads do the tasks. library.pyx and linked.pyx are drivers and
    kernels for a library without Python.
7.  To add an operation: a kernel or a step, its place in `KernelTable`, its phases, and
    a function in `_view`. To add an element type: a branch in simd.h, and its name
    where the others are. CONTRIBUTING.md lists the places.
"""

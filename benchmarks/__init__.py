# SPDX-License-Identifier: BSD-3-Clause
"""fastbn beside its peers, and beside a copy of the same tensor.

    python -m pip install ".[bench]"
    python -m benchmarks --quick

    cases.py        which norms and shapes, from which networks; the arrays of one case
    contenders.py   who takes part in a case: copies, fastbn, peers
    peers/          how NumPy, PyTorch, ONNX Runtime, JAX and oneDNN carry out one case,
                    each prepared as well as it can be
    native.py       compiles copies.c and onednn.c, which are no part of the package
    race.py         times the contenders of a case in interleaved rounds
    machine.py      date, processor, versions, command
    results.py      what a run has found, in memory and as JSON
    report.py       results -> Markdown; also the pages of docs/tables
    plots.py        results -> plots
    __main__.py     the command line; one process for each number of threads

Run it on an idle machine: nothing else, not even an editor that compiles.
Beside these, each of them a command of its own:

    accuracy.py         errors of the variance
    fusion.py           the cost of activations and residuals
    images.py           integers and layouts, beside OpenCV and torchvision
    options.py          the cost of ghost batches, guards and other options of statistics
    memory.py           what in-place training saves
    torch_overhead.py   the time of small calls of fastbn.torch
    test_calls.py       cases for pytest-benchmark
"""

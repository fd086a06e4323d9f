# SPDX-License-Identifier: BSD-3-Clause
"""Numbers of threads: where they come from; forks; calls side by side."""

import concurrent.futures
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from arrays import batch

import fastbn

BIG = (8, 32, 64, 64)


def run(code, **environment):
    """Run code in a process of its own; return what it printed, or raise."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout.strip()


def test_set_and_restore():
    default = fastbn.get_num_threads()
    fastbn.set_num_threads(7)
    assert fastbn.get_num_threads() == 7
    with fastbn.threads(3) as context:
        assert fastbn.get_num_threads() == 3
        with context, fastbn.threads(None):
            assert fastbn.get_num_threads() == default
        assert fastbn.get_num_threads() == 3
    assert fastbn.get_num_threads() == 7
    with pytest.raises(KeyError), fastbn.threads(2):
        raise KeyError
    assert fastbn.get_num_threads() == 7
    fastbn.set_num_threads(np.int64(2))
    assert fastbn.get_num_threads() == 2
    fastbn.set_num_threads(None)
    assert fastbn.get_num_threads() == default


@pytest.mark.parametrize(
    ("bad", "error"),
    [(0, ValueError), (-1, ValueError), (2**40, ValueError), (1.5, TypeError), ("2", TypeError),
     (True, TypeError)],
)  # fmt: skip
def test_bad_numbers(bad, error):
    with pytest.raises(error, match=r"^n: "):
        fastbn.set_num_threads(bad)
    with pytest.raises(error, match=r"^n: "):
        fastbn.threads(bad)


def test_environment():
    code = "import fastbn; print(fastbn.get_num_threads(), fastbn.show_config()['threads_from'])"
    assert run(code, FASTBN_NUM_THREADS="5") == "5 FASTBN_NUM_THREADS"
    default = "OpenMP" if fastbn.show_config()["openmp"] else "built without OpenMP"
    assert run(code, FASTBN_NUM_THREADS="", OMP_NUM_THREADS="1") == f"1 {default}"
    set_first = "import fastbn; fastbn.set_num_threads(4); " + code
    assert run(set_first, FASTBN_NUM_THREADS="5") == "4 set_num_threads"
    for bad in ("0", "-2", "many", "1.5"):
        with pytest.raises(RuntimeError, match="FASTBN_NUM_THREADS: expected an integer"):
            run(code, FASTBN_NUM_THREADS=bad)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity here")
def test_affinity():
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
        "import fastbn; print(fastbn.get_num_threads())"
    )
    assert run(code, OMP_NUM_THREADS="8") == "1"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_works_at_once():
    code = """
import os, warnings
warnings.simplefilter("ignore")
import numpy as np, fastbn
x = np.random.default_rng(0).standard_normal((8, 32, 64, 64), dtype=np.float32)
fastbn.set_num_threads(2)
expected = fastbn.batch_norm(x, None, None, training=True).tobytes()
pid = os.fork()
if pid == 0:
    same = fastbn.batch_norm(x, None, None, training=True).tobytes() == expected
    os._exit(0 if same else 1)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    assert run(code) == "0"


def test_a_small_stack_is_enough():
    # 128 KB is what musl gives a thread. Outliers take the deepest path.
    results = []

    def work():
        for dtype in (np.float32, np.float64):
            x = batch((64, 8, 7, 7), dtype)
            x[::16] = 1e6
            _, mean, invstd = fastbn.batch_norm_forward(x)
            results.append(fastbn.batch_norm_backward(x, x, mean, invstd)[0])

    before = threading.stack_size(128 * 1024)
    try:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    finally:
        threading.stack_size(before)
    assert len(results) == 2


def test_calls_from_many_threads_at_once():
    batches = [batch(BIG, "float32", seed) for seed in range(4)]
    expected = [fastbn.batch_norm(x, None, None, training=True).tobytes() for x in batches]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            results = pool.map(lambda x: fastbn.batch_norm(x, None, None, training=True), batches)
            assert [y.tobytes() for y in results] == expected

# SPDX-License-Identifier: BSD-3-Clause
"""Numbers of threads: where they come from, and calls side by side."""

import concurrent.futures
import contextlib
import hashlib
import itertools
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from arrays import batch
from cases import Case
from processes import run

import fastbn
from fastbn import _cgroup, _digests, _selftest, _threads

BIG = (8, 32, 64, 64)


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


def processors():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


needs_two_processors = pytest.mark.skipif(
    processors() < 2, reason="only one processor here: one thread is the default anyway"
)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity here")
@needs_two_processors
def test_affinity():
    code = """
import os
one = {min(os.sched_getaffinity(0))}
if "before" in os.environ["WHEN"]:
    os.sched_setaffinity(0, one)
import fastbn
os.sched_setaffinity(0, one)
print(fastbn.get_num_threads())
"""
    for when in "before the import", "after it":
        assert run(code, OMP_NUM_THREADS="8", WHEN=when) == "1"


@needs_two_processors
def test_threadpoolctl():
    code = """
import fastbn, threadpoolctl
for chosen in (None, 3):
    fastbn.set_num_threads(chosen)
    with threadpoolctl.threadpool_limits(1):
        print(fastbn.get_num_threads(), end=" ")
"""
    assert run(code, OMP_NUM_THREADS="2") == "1 3"


# Control groups as /proc and /sys show them: the process's groups, what is mounted
# where, the files of quotas, and how many processors that makes.
MOUNT_2 = "30 23 0:26 {root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw"
MOUNT_1 = "32 31 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"
GROUPS = {
    "none": ("", "", {}, None),
    "no limit": ("0::/", MOUNT_2.format(root="/"), {"cpu.max": "max 100000"}, None),
    "container": ("0::/", MOUNT_2.format(root="/"), {"cpu.max": "150000 100000"}, 1.5),
    "nested, the inner one is less": (
        "0::/a/b", MOUNT_2.format(root="/"),
        {"a/cpu.max": "400000 100000", "a/b/cpu.max": "100000 50000"}, 2.0),
    "nested, the outer one is less": (
        "0::/a/b/c", MOUNT_2.format(root="/"),
        {"a/cpu.max": "50000 100000", "a/b/cpu.max": "max 100000", "a/b/c/cpu.max": "8 4"}, 0.5),
    "part of the hierarchy is mounted": (
        "0::/docker/1/in", MOUNT_2.format(root="/docker/1"),
        {"cpu.max": "300000 100000", "in/cpu.max": "max 100000"}, 3.0),
    "another part is mounted": (
        "0::/elsewhere", MOUNT_2.format(root="/docker/1"), {"cpu.max": "300000 100000"}, 3.0),
    "another part is mounted, too": (
        "0::/a", MOUNT_2.format(root="/") + "\\n31 23 0:26 /b /mnt rw - cgroup2 cgroup2 rw",
        {"a/cpu.max": "200000 100000", "../../../mnt/cpu.max": "100000 100000"}, 2.0),
    "version 1": (
        "4:cpu,cpuacct:/x", MOUNT_1.format(root="/"),
        {"x/cpu.cfs_quota_us": "250000", "x/cpu.cfs_period_us": "100000",
         "cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, 2.5),
    "version 1, in a container": (
        "4:cpu,cpuacct:/docker/9", MOUNT_1.format(root="/docker/9"),
        {"cpu.cfs_quota_us": "50000", "cpu.cfs_period_us": "100000"}, 0.5),
    "version 1, no limit": (
        "4:cpu:/", MOUNT_1.format(root="/"),
        {"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, None),
    "a controller of another name": (
        "4:cpuset:/x", MOUNT_1.format(root="/").replace("cpu,cpuacct", "cpuset"),
        {"x/cpu.cfs_quota_us": "250000", "x/cpu.cfs_period_us": "100000"}, None),
    "a folder with a space": (
        "0::/my group", MOUNT_2.format(root="/").replace("/sys/fs/cgroup", "/sys\\040fs"),
        {"my group/cpu.max": "700000 100000"}, 7.0),
    "a name with a line separator": (
        "0::/a\u2028b:c", MOUNT_2.format(root="/"), {"a\u2028b:c/cpu.max": "3 2"}, 1.5),
    "nonsense": ("0::/", MOUNT_2.format(root="/"), {"cpu.max": "soon"}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPS)
def test_quotas(name, tmp_path):
    ours, mounts, files, expected = GROUPS[name]
    process = tmp_path / "proc/self"
    process.mkdir(parents=True)
    (process / "cgroup").write_text(f"12:pids:/p\n{ours}\nnonsense\n" if ours else "")
    (process / "mountinfo").write_text(f"22 1 0:20 / / rw - ext4 /dev/a rw\n{mounts}\nnonsense\n")
    where = mounts.split()[4].replace("\\040", " ") if mounts else ""
    for file, text in files.items():
        path = tmp_path / where.lstrip("/") / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert _cgroup.processors(str(tmp_path)) == expected


def own_group():
    """A control group of our own with a quota of half a processor, where that is allowed."""
    for parent, quota in (
        ("/sys/fs/cgroup", {"cpu.max": "50000 100000"}),
        ("/sys/fs/cgroup/cpu", {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "50000"}),
    ):
        group = Path(parent, f"fastbn-test-{os.getpid()}")
        if not Path(parent, "cgroup.procs").exists() or not os.access(parent, os.W_OK):
            continue
        try:
            group.mkdir()
            for file, text in quota.items():
                (group / file).write_text(text)
            return group
        except OSError:
            if group.exists():
                group.rmdir()
    return None


def test_a_real_quota():
    if fastbn.get_num_threads() == 1:
        pytest.skip("one thread is all there is")
    group = own_group()
    if group is None:
        pytest.skip("may not make control groups here")
    code = """
import os, time, fastbn
def threads():
    return f'{fastbn.get_num_threads()} {fastbn.show_config()["threads_from"]}'
print(threads())
open(os.environ["GROUP"] + "/cgroup.procs", "w").write(str(os.getpid()))
time.sleep(1.1)
print(threads())
"""
    try:
        before, after = run(code, GROUP=str(group), OMP_NUM_THREADS="2").splitlines()
    finally:
        with contextlib.suppress(OSError):
            group.rmdir()
    assert before == "2 OpenMP"
    assert after == "1 control group's quota"


@pytest.mark.skipif(fastbn.show_config()["openmp"] is None, reason="built without OpenMP")
def test_calls_are_serial_after_a_wasted_team():
    def teams(calls, size=1 << 21):
        return [_threads.threads_for(size) for _ in range(calls)]

    fastbn.set_num_threads(4)
    _threads.always_parallel(False)  # forgets the teams of other tests
    assert teams(1, 1000) == [1]
    assert teams(1, -1000) == [1]
    assert teams(3) == [4, 4, 4]
    try:
        for rest in (1, 2, 4):
            _threads.team_was(1e-12, 1 << 21)
            assert teams(rest + 2) == [1] * rest + [4, 4]
        _threads.team_was(-1.0, 1 << 30)
        for _ in range(3):
            _threads.team_was(0.0, 1 << 21)
        _threads.team_was(1e-12, 1 << 21)
        assert teams(3, 1 << 30) == [4, 4, 4]
        assert teams(6) == [1] * 5 + [4]
        for _ in range(20):
            _threads.team_was(1e-12, 1 << 21)
        assert teams(300) == [1] * 256 + [4] * 44

        _threads.always_parallel(False)
        for _ in range(12):
            _threads.team_was(3600.0, 1 << 21)
        assert teams(300) == [1] * 300  # the calls, and then seconds
        assert teams(3, 1 << 30) == [4, 4, 4]
        _threads.always_parallel(False)
        for _ in range(2):
            _threads.team_was(3600.0, 1 << 21)  # 50 ms of it count
        time.sleep(0.1)
        assert teams(4) == [1, 1, 4, 4]
    finally:
        _threads.always_parallel(False)


@pytest.mark.skipif(fastbn.show_config()["openmp"] is None, reason="built without OpenMP")
@pytest.mark.parametrize("limit", [{}, {"OMP_THREAD_LIMIT": "1"}, {"OMP_DYNAMIC": "TRUE"}])
def test_a_team_that_is_smaller_than_asked_for(limit):
    code = """
import hashlib, numpy as np, fastbn
fastbn.set_num_threads(5)
x = np.random.default_rng(0).standard_normal((40, 32, 64, 64), dtype=np.float32)
print(hashlib.sha256(fastbn.batch_norm(x, None, None, training=True)).hexdigest())
"""
    x = np.random.default_rng(0).standard_normal((40, 32, 64, 64), dtype=np.float32)
    with fastbn.threads(1):
        expected = hashlib.sha256(fastbn.batch_norm(x, None, None, training=True)).hexdigest()
    assert run(code, **limit) == expected


def test_other_python_threads_run_during_a_call():
    x = np.zeros((64, 64, 128, 128), np.float32)
    y = np.empty_like(x)
    ends = []

    def work():
        ends.append(time.perf_counter())
        fastbn.batch_norm(x, np.zeros(64), np.ones(64), training=True, out=y)
        ends.append(time.perf_counter())

    moments = []
    thread = threading.Thread(target=work)
    thread.start()
    while len(ends) < 2:
        moments.append(time.perf_counter())
        time.sleep(0)
    thread.join()
    # With the GIL held, nothing would happen between the two ends.
    quarter = (ends[1] - ends[0]) / 4
    assert any(ends[0] + quarter < moment < ends[1] - quarter for moment in moments)


def test_a_small_stack_is_enough():
    # 128 KB is what musl gives a thread. Outliers take the deepest path.
    results, dtypes = [], _selftest.dtypes()

    def work():
        for dtype in dtypes:
            planes = batch((64, 8, 7, 7), dtype)
            rows = batch((64, 7, 7, 15), dtype)[::2]  # apart, so gathered first
            for x, layout in (planes, None), (rows, "NHWC"):
                x[::16] = 1e6 if dtype != "float16" else 6e4
                for case in (
                    Case("batch", x.shape, layout=layout),
                    Case("layer", x.shape, x.shape[-1]),
                    Case("layer", x.shape, x.shape[1:]),
                    Case("rms", x.shape, x.shape[1:]),
                    Case("group", x.shape, 1, layout),
                    Case("instance", x.shape, layout=layout),
                ):
                    weight, bias = case.parameters(dtype)
                    _, saved = case.forward(x, weight, bias)
                    results.append(case.backward(x, x, saved, weight)[0])
                    if case.op in ("batch", "group", "instance"):
                        axis = case.layout.index("C") if case.layout else 1
                        shape = x.shape[:axis] + x.shape[axis + 1 :]
                        mask = np.arange(np.prod(shape)).reshape(shape) % 3 > 0
                        _, saved = case.forward(x, weight, bias, mask=mask)
                        case.backward(x, x, saved, weight, mask=mask)

    before = threading.stack_size(128 * 1024)
    try:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    finally:
        threading.stack_size(before)
    assert len(results) == len(dtypes) * 2 * 6


def test_calls_from_many_threads_at_once():
    batches = [batch(BIG, "float32", seed) for seed in range(4)]
    expected = [fastbn.batch_norm(x, None, None, training=True).tobytes() for x in batches]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            results = pool.map(lambda x: fastbn.batch_norm(x, None, None, training=True), batches)
            assert [y.tobytes() for y in results] == expected


def test_siblings_from_many_threads_at_once():
    cases = [Case("layer", BIG, BIG[1:]), Case("rms", BIG, 64), Case("group", BIG, 4),
             Case("instance", BIG)]  # fmt: skip
    x = batch(BIG, "float32")

    def both(case):
        y, saved = case.forward(x)
        return [part.tobytes() for part in (y, *saved, *case.backward(x, x, saved))]

    expected = [both(case) for case in cases]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            assert list(pool.map(both, cases)) == expected


def test_layers_that_share_arrays_from_many_threads():
    x = batch(BIG, "float32")
    x.flags.writeable = False
    layers = [fastbn.BatchNorm(BIG[1]) for _ in range(4)]
    for layer in layers[1:]:
        layer.weight, layer.bias = layers[0].weight, layers[0].bias
    expected = fastbn.BatchNorm(BIG[1])(x).tobytes()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            assert {y.tobytes() for y in pool.map(lambda layer: layer(x), layers)} == {expected}
        evaluated = layers[0].eval()
        expected = evaluated(x).tobytes()
        results = pool.map(lambda _: evaluated(x).tobytes(), range(8))
        assert set(results) == {expected}
    for layer in layers[1:]:
        assert layer.running_mean.tobytes() == evaluated.running_mean.tobytes()


def at_once(work, callers=8):
    """The results of one function, called by threads that all begin together."""
    barrier = threading.Barrier(callers)

    def begin(caller):
        barrier.wait()
        return work(caller)

    with concurrent.futures.ThreadPoolExecutor(callers) as pool:
        return list(pool.map(begin, range(callers)))


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("operation", _selftest.OPERATIONS)
def test_every_operation_from_many_threads_on_shared_arrays(operation, number, always_parallel):
    shared = {dtype: list(_selftest.inputs(dtype)) for dtype in _selftest.dtypes()}
    dtypes = list(shared)
    for batch_ in itertools.chain(*shared.values()):
        for array in (batch_.x, batch_.dy, batch_.weight, batch_.bias):
            array.flags.writeable = False

    def work(caller):
        # Each begins with another dtype, so that different calls meet, too.
        turn = caller % len(dtypes)
        return {dtype: _selftest.digest(operation, shared[dtype])
                for dtype in dtypes[turn:] + dtypes[:turn]}  # fmt: skip

    expected = {dtype: _digests.DIGESTS[dtype][operation] for dtype in dtypes}
    with fastbn.threads(number):
        assert at_once(work) == [expected] * 8


LAYERS = {
    "batch": lambda: fastbn.BatchNorm(12),
    "layer": lambda: fastbn.LayerNorm((12, 9, 10)),
    "rms": lambda: fastbn.RMSNorm(10),
    "group": lambda: fastbn.GroupNorm(3, 12),
    "instance": lambda: fastbn.InstanceNorm(12, affine=True, track_running_stats=True),
}


@pytest.mark.parametrize("name", LAYERS)
def test_one_layer_from_many_threads(name, any_dtype, always_parallel):
    x, dy = (batch((6, 12, 9, 10), any_dtype, seed) for seed in (0, 1))
    layer = LAYERS[name]()
    y, dx = layer(x).tobytes(), layer.backward(dy).tobytes()

    def train(_):
        # All with one x, so that whichever call was the last one, dx is the same.
        return [(layer(x).tobytes(), layer.backward(dy).tobytes()) for _ in range(10)]

    assert at_once(train) == [[(y, dx)] * 10] * 8
    layer.eval()
    y = layer(x).tobytes()
    assert at_once(lambda _: [layer(x).tobytes() for _ in range(10)]) == [[y] * 10] * 8


def test_numbers_of_threads_change_during_calls():
    x = batch(BIG, "float32")
    expected = fastbn.batch_norm(x, None, None, training=True).tobytes()

    def work(caller):
        fastbn.set_num_threads(1 + caller % 3)
        return fastbn.batch_norm(x, None, None, training=True).tobytes()

    assert set(at_once(work)) == {expected}


@pytest.mark.skipif(getattr(sys, "_is_gil_enabled", lambda: True)(), reason="Python has a GIL")
def test_the_import_does_not_bring_the_gil_back():
    # Python warns of a module that does, and tests make an error of it; said once more.
    assert run("import sys, fastbn; print(sys._is_gil_enabled())") == "False"

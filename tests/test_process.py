# SPDX-License-Identifier: BSD-3-Clause
"""What fastbn does to its process, and what the process may do to fastbn.

Forks, signals, and all that importing and calling must leave alone. With PyTorch
in the process, too, where it is installed; with FASTBN_REQUIRE_PEERS=1 a missing
PyTorch is a failure, not a skip.
"""

import importlib.util
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import run

import fastbn

TORCH = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None and os.environ.get("FASTBN_REQUIRE_PEERS") != "1",
    reason="no PyTorch here",
)
IMPORTS = {
    "alone": "import fastbn",
    "PyTorch first": "import torch, fastbn",
    "PyTorch second": "import fastbn, torch",
}
IMPORT_PARAMETERS = [
    pytest.param(code, id=name, marks=TORCH if "torch" in code else ())
    for name, code in IMPORTS.items()
]
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")

# A batch of 8 MB, and its result with two threads: the parent's team exists then.
START = """
import ctypes, hashlib, multiprocessing, os, sys, threading, warnings
warnings.simplefilter("ignore")
{imports}
import numpy as np
x = np.random.default_rng(0).standard_normal((16, 32, 64, 64), dtype=np.float32)

def digest(_=None):
    y, mean, invstd = fastbn.batch_norm_forward(x)
    dx = fastbn.batch_norm_backward(x, x, mean, invstd)[0]
    return hashlib.sha256(y.tobytes() + dx.tobytes()).hexdigest()

fastbn.set_num_threads(2)
if "torch" in sys.modules:
    sys.modules["torch"].set_num_threads(2)
    sys.modules["torch"].ones(1 << 22).sum()
expected = digest()
"""
FORK = """
def fork(pid):
    if pid == 0:
        try:
            assert fastbn.get_num_threads() == 1
            fastbn.set_num_threads(2)
            assert fastbn.show_config()["threads_from"] == "forked child"
            os._exit(0 if digest() == expected else 1)
        except BaseException:
            os._exit(2)
    found.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
found = []
"""
FORKS = {
    "from the main thread": "fork(os.fork())",
    "from another thread": """
thread = threading.Thread(target=lambda: fork(os.fork()))
thread.start()
thread.join()
""",
    "by C": "fork(ctypes.PyDLL(None).fork())",
    "during a call": """
stop = False
def work():
    while not stop:
        digest()
thread = threading.Thread(target=work)
thread.start()
fork(os.fork())
stop = True
thread.join()
""",
    "of a fork": """
pid = os.fork()
if pid == 0:
    fork(os.fork())
    os._exit(found[0])
fork(pid)
""",
}


@needs_fork
@pytest.mark.parametrize("how", FORKS)
@pytest.mark.parametrize("imports", IMPORT_PARAMETERS)
def test_a_forked_child_works_at_once(imports, how):
    code = START.format(imports=imports) + FORK + FORKS[how]
    # The parent's own threads are as they were.
    code += "\nprint(found, fastbn.get_num_threads(), digest() == expected)"
    assert run(code) == "[0] 2 True"


@needs_fork
@pytest.mark.skipif(fastbn.show_config()["openmp"] is None, reason="built without OpenMP")
def test_a_fork_before_the_import():
    # The parent has a team of OpenMP's, but not through fastbn.
    code = """
import ctypes, os, numpy as np
runtime = ctypes.CDLL("RUNTIME")
start = getattr(runtime, "GOMP_parallel")
start(ctypes.cast(ctypes.CDLL(None).abs, ctypes.c_void_p), None, 2, 0)
pid = os.fork()
if pid == 0:
    import fastbn
    fastbn.set_num_threads(2)
    x = np.ones((16, 32, 64, 64), np.float32)
    fastbn.batch_stats(x)
    os._exit(0 if fastbn.show_config()["threads_from"] == "forked child" else 1)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    if "libgomp" not in fastbn.show_config()["openmp"] or sys.platform != "linux":
        pytest.skip("made for libgomp")
    # The file, since a wheel's own copy is not where the loader looks for the name.
    maps = Path("/proc/self/maps").read_text().split()
    runtime = next(word for word in maps if "/libgomp" in word)
    assert run(code.replace("RUNTIME", runtime)) == "0"


@needs_fork
def test_a_fork_before_the_import_without_openmp():
    code = """
import os
pid = os.fork()
if pid == 0:
    import fastbn
    os._exit(0 if fastbn.show_config()["threads_from"] != "forked child" else 1)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    assert run(code) == "0"


@needs_fork
@pytest.mark.parametrize("imports", IMPORT_PARAMETERS)
def test_a_pool_of_processes(imports):
    code = (
        START.format(imports=imports)
        + """
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(set(pool.map(digest, range(4))) == {expected})
"""
    )
    assert run(code) == "True"


@needs_fork
@TORCH
def test_workers_of_a_data_loader():
    code = (
        START.format(imports="import torch, fastbn")
        + """
class Normalized(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        return torch.tensor(digest() == expected)
loader = torch.utils.data.DataLoader(Normalized(), batch_size=2, num_workers=2,
                                     multiprocessing_context="fork")
print([batch.tolist() for batch in loader])
"""
    )
    assert run(code) == "[[True, True], [True, True]]"


# One image, very many times: a call that takes half a minute, were it not interrupted.
LONG_CALL = """
import os, signal, threading, time
import numpy as np, fastbn
signal.signal(signal.SIGINT, signal.default_int_handler)
fastbn.set_num_threads({threads})
images = 1 << 18
x = np.broadcast_to(np.ones((1, 8, 256, 256), np.float32), (images, 8, 256, 256))
start = time.perf_counter()
fastbn.batch_stats(x[: images // 256])
whole = 256 * (time.perf_counter() - start)
sent = []

def interrupt():
    time.sleep(whole / 64)
    sent.append(time.perf_counter())
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt, daemon=True).start()
try:
    fastbn.batch_stats(x)
    print("finished")
except KeyboardInterrupt:
    # Far from the end, where Python would have raised it anyway.
    print("interrupted", time.perf_counter() - sent[0] < whole / 4)
"""
needs_signals = pytest.mark.skipif(os.name == "nt", reason="no such signals here")


@needs_signals
@pytest.mark.parametrize("threads", [1, 2])
def test_a_long_call_is_interrupted(threads):
    assert run(LONG_CALL.format(threads=threads)) == "interrupted True"


# The signal may come while the quota of processors is read, between opening a file and `with`.
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <_io.FileIO:pytest.PytestUnraisableExceptionWarning"
)
@needs_signals
@pytest.mark.parametrize("operation", ["training", "instances", "inference", "backward", "copies"])
def test_an_interrupted_call_leaves_running_statistics_alone(operation):
    shape = (48, 64, 128, 128)
    x = np.broadcast_to(np.ones((1, *shape[1:]), np.float32), shape)
    y = np.full(shape, np.nan, np.float32)
    running = np.zeros(64), np.ones(64, np.float32)
    calls = {
        "training": lambda: fastbn.batch_norm(x, *running, training=True, out=y),
        "instances": lambda: fastbn.instance_norm(x, *running, out=y),
        "inference": lambda: fastbn.batch_norm(x, *running, out=y),
        "backward": lambda: fastbn.batch_norm_backward(x, x, *running, out=y),
    }
    # Cropped images, which no view describes: the signal comes while they are copied.
    wide = np.ones((*shape[:-1], 129), np.float32) if operation == "copies" else x
    calls["copies"] = lambda: fastbn.batch_norm(wide[..., 1:], *running, training=True, out=y)

    class AlarmError(Exception):
        pass

    def handler(*_):
        raise AlarmError

    def call_with_alarm():
        signal.setitimer(signal.ITIMER_REAL, 1e-3)
        calls[operation]()

    before = signal.signal(signal.SIGALRM, handler)
    try:
        # Whether the call is stopped or looks for signals at its end only, it raises.
        with pytest.raises(AlarmError):
            call_with_alarm()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert operation != "copies" or np.isnan(y).all()
    assert not running[0].any()
    assert (running[1] == 1).all()


@pytest.mark.parametrize("peer", ["", pytest.param("import torch", marks=TORCH)])
def test_the_process_is_left_as_it_was(peer):
    code = """
import ctypes, ctypes.util, os, signal, sys
import numpy as np
PEER

def rounding():
    return ctypes.CDLL(ctypes.util.find_library("m") or None).fegetround()

def state():
    tiny = np.array([1e-42], np.float32)
    return {
        "rounding": sys.platform == "linux" and rounding(),
        "subnormals": bool((tiny * np.ones(1, np.float32) != 0).all()),
        "error handling": np.geterr(),
        "signals": [signal.getsignal(number) for number in signal.valid_signals()],
        "variables": dict(os.environ),
        "affinity": os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None,
    }

def openmp_settings():
    runtime = fastbn.show_config()["openmp"]
    if runtime is None:
        return None
    library = ctypes.CDLL(runtime.partition(",")[0])
    return [getattr(library, f"omp_get_{name}")()
            for name in ("max_threads", "dynamic", "max_active_levels", "num_procs")]

before = state()
import fastbn
after_import = state()
settings = openmp_settings()
x = np.random.default_rng(0).standard_normal((16, 32, 64, 64), dtype=np.float32)
for threads in (1, 2, 5):
    with fastbn.threads(threads):
        y, mean, invstd = fastbn.batch_norm_forward(x)
        fastbn.batch_norm_backward(x, x, mean, invstd)
after_calls = state()
assert openmp_settings() == settings
for name in before:
    assert before[name] == after_import[name] == after_calls[name], name
print("as it was")
"""
    assert run(code.replace("PEER", peer)) == "as it was"

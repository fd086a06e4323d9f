# SPDX-License-Identifier: BSD-3-Clause
"""What fastbn does to its process, and what the process may do to fastbn.

Forks, signals, and all that importing and calling must leave alone. With PyTorch
in the process, too, where it is installed; with FASTBN_REQUIRE_PEERS=1 a missing
PyTorch is a failure, not a skip.
"""

import importlib.util
import os
import signal

import numpy as np
import pytest
from test_threads import run

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
loader = torch.utils.data.DataLoader(Normalized(), batch_size=2, num_workers=2)
print([batch.tolist() for batch in loader])
"""
    )
    assert run(code) == "[[True, True], [True, True]]"


# A call that takes half a minute and more: one image, half a million times.
LONG_CALL = """
import os, signal, threading, time
import numpy as np, fastbn
fastbn.set_num_threads({threads})
x = np.broadcast_to(np.ones((1, 8, 256, 256), np.float32), (1 << 18, 8, 256, 256))

def interrupt():
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt, daemon=True).start()
try:
    fastbn.batch_stats(x)
    print("finished")
except KeyboardInterrupt:
    print("interrupted")
"""
needs_signals = pytest.mark.skipif(os.name == "nt", reason="no such signals here")


@needs_signals
@pytest.mark.parametrize("threads", [1, 2])
def test_a_long_call_is_interrupted(threads):
    assert run(LONG_CALL.format(threads=threads)) == "interrupted"


@needs_signals
@pytest.mark.parametrize("operation", ["training", "inference", "backward", "a copy"])
def test_an_interrupted_call_leaves_running_statistics_alone(operation):
    shape = (48, 64, 128, 128)
    x = np.broadcast_to(np.ones((1, *shape[1:]), np.float32), shape)
    # Cropped images are an output that no view describes: it is written by copying.
    y = np.full((*shape[:-1], 129 if operation == "a copy" else 128), np.nan, np.float32)
    out = y[..., :128]
    running = np.zeros(64), np.ones(64, np.float32)
    calls = {
        "training": lambda: fastbn.batch_norm(x, *running, training=True, out=out),
        "inference": lambda: fastbn.batch_norm(x, *running, out=out),
        "backward": lambda: fastbn.batch_norm_backward(x, x, *running, out=out),
    }
    calls["a copy"] = calls["training"]

    def handler(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, handler)
    try:
        # It comes during the first 128 MB, after which the call looks for it.
        signal.setitimer(signal.ITIMER_REAL, 1e-3)
        with pytest.raises(KeyboardInterrupt):
            calls[operation]()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert np.isnan(y[-1]).any()
    assert not running[0].any()
    assert (running[1] == 1).all()


@pytest.mark.parametrize("peer", ["", pytest.param("import torch", marks=TORCH)])
def test_the_process_is_left_as_it_was(peer):
    code = """
import ctypes, os, signal, sys
import numpy as np
PEER

def state():
    tiny = np.array([1e-42], np.float32)
    return {
        "rounding": sys.platform == "linux" and ctypes.CDLL("libm.so.6").fegetround(),
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

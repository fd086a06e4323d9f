# SPDX-License-Identifier: BSD-3-Clause
"""One OpenMP runtime in the process, beside libraries that bring one of their own.

Of use where fastbn is an installed wheel (docs/wheels.md), true everywhere. Skipped for
each library that is not installed; with FASTBN_REQUIRE_PEERS=1 that is a failure.
"""

import importlib.util
import os
import sys

import pytest
from processes import run

import fastbn

if sys.platform != "linux" or "libgomp" not in str(fastbn.show_config()["openmp"]):
    pytest.skip("about libgomp on Linux", allow_module_level=True)
if len(os.sched_getaffinity(0)) < 2:
    pytest.skip("needs two processors", allow_module_level=True)

# What the other library does on its threads.
WORK = {
    "torch": "torch.ones(1 << 22).sum()\n",
    "sklearn": """
from sklearn.cluster import KMeans
KMeans(3, n_init=1, max_iter=3).fit(np.random.default_rng(0).random((5000, 4)))
""",
    "lightgbm": """
data = np.random.default_rng(0).random((5000, 4))
lightgbm.train({"verbosity": -1}, lightgbm.Dataset(data, data[:, 0] > 0.5), 3)
""",
}
# scikit-learn's wheel renames its copy, so it has a runtime of its own whatever others do,
# and OMP_PROC_BIND leaves one processor to the runtime that is loaded second.
SHARES = ["torch", "lightgbm"]


def start(peer, order):
    required = os.environ.get("FASTBN_REQUIRE_PEERS") == "1"
    if importlib.util.find_spec(peer) is None and not required:
        pytest.skip(f"no {peer} here")
    imports = {"first": f"{peer}, fastbn", "second": f"fastbn, {peer}"}[order]
    return (
        f"import hashlib, os, warnings\nimport numpy as np\nimport {imports}\n"
        + """
warnings.simplefilter("ignore")
from threadpoolctl import threadpool_info, threadpool_limits
x = np.random.default_rng(0).standard_normal((16, 32, 64, 64), dtype=np.float32)

def digest():
    y, mean, invstd = fastbn.batch_norm_forward(x)
    dx = fastbn.batch_norm_backward(x, x, mean, invstd)[0]
    return hashlib.sha256(y.tobytes() + dx.tobytes()).hexdigest()

def runtimes():
    return [entry for entry in threadpool_info() if entry["user_api"] == "openmp"]

def others():
    # scikit-learn's renamed copy, which LightGBM imports, too.
    return [entry for entry in runtimes() if "scikit_learn.libs" in entry["filepath"]]
"""
    )


def in_both_orders(peers):
    return lambda test: pytest.mark.parametrize("order", ["first", "second"])(
        pytest.mark.parametrize("peer", peers)(test)
    )


@in_both_orders(WORK)
def test_there_is_one_libgomp(peer, order):
    code = start(peer, order) + WORK[peer]
    assert run(code + "digest()\nprint(len(runtimes()) - len(others()))") == "1"


@in_both_orders(WORK)
def test_limits_hold(peer, order):
    code = start(peer, order) + WORK[peer]
    code += """
digest()
found = [fastbn.get_num_threads()]
with threadpool_limits(1):
    found += [fastbn.get_num_threads(), *{entry["num_threads"] for entry in runtimes()}]
found += [fastbn.get_num_threads()]
if "torch" in globals():
    torch.set_num_threads(1)
    assert fastbn.get_num_threads() == 1
print(*found)
"""
    assert run(code, OMP_NUM_THREADS="2") == "2 1 1 2"


@in_both_orders(WORK)
def test_forked_children_live(peer, order):
    code = start(peer, order) + WORK[peer]
    code += """
expected = digest()
pid = os.fork()
if pid == 0:
    os._exit(digest() != expected)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), digest() == expected)
"""
    assert run(code) == "0 True"


@in_both_orders(SHARES)
def test_bound_threads_are_all_there(peer, order):
    code = start(peer, order) + WORK[peer]
    code += """
digest()
(runtime,) = [entry for entry in runtimes() if entry not in others()]
print(fastbn.get_num_threads(), runtime["num_threads"])
"""
    alone = run("import fastbn; print(fastbn.get_num_threads())", OMP_NUM_THREADS="2")
    assert run(code, OMP_PROC_BIND="TRUE", OMP_NUM_THREADS="2") == f"{alone} 2"
    # Without a number, libgomp counts the processors that it sees.
    bound = run(code, OMP_PROC_BIND="TRUE", OMP_NUM_THREADS="")
    assert bound == f"{alone} {len(os.sched_getaffinity(0))}"

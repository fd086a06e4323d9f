# SPDX-License-Identifier: BSD-3-Clause
"""fastbn.torch in programs: compiled, exported, traced; in other processes; in the docs."""

import doctest
import importlib
from functools import partial

import numpy as np
import pytest
from processes import run
from tensors import kernels, torch  # noqa: F401
from torch import nn

import fastbn.torch

pytestmark = [
    pytest.mark.usefixtures("kernels"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


def model():
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4), nn.Flatten(), nn.LayerNorm(64), nn.RMSNorm(64),
    )  # fmt: skip
    return fastbn.torch.convert(layers)


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def gradients(program, module):
    module.zero_grad()
    program(X).pow(3).sum().backward()
    return [*(p.grad.clone() for p in module.parameters()), *(b.clone() for b in module.buffers())]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(
    ("norm", "sizes", "eps"),
    [("batch", [], 1e-5), ("layer", [6], 1e-5), ("rms", [6], None), ("group", [2], 1e-5),
     ("instance", [], 1e-5)],
)  # fmt: skip
def test_opcheck(norm, sizes, eps, activation, residual):
    x = torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last).requires_grad_()
    features = 6 if sizes == [6] else 4
    weight, bias = (torch.randn(features, requires_grad=True) for _ in range(2))
    added = torch.randn_like(x).requires_grad_() if residual else None
    running = (torch.zeros(4), torch.ones(4)) if norm in ("batch", "instance") else (None, None)
    given = x, weight, None if norm == "rms" else bias, added, *running
    options = norm, sizes, True, 0.1, eps, activation, 0.01
    torch.library.opcheck(torch.ops.fastbn.normalise.default, (*given, *options))


def test_compiled():
    eager, compiled = model(), model()
    program = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(gradients(program, compiled), gradients(eager, eager))
    eager.eval(), compiled.eval()
    torch.testing.assert_close(program(X), eager(X))


def unaligned(x):
    memory = np.empty(2 + 4 * x.numel(), np.uint8)[2:].view(np.float32)
    memory[...] = x.numpy().ravel()
    return torch.from_numpy(memory).view(x.shape)


#: What the kernels leave to PyTorch, or copy: x, eps.
REFUSED = {
    "empty": (torch.empty(0, 4, 6), 1e-5),
    "without eps": (torch.randn(3, 4, 6), 0.0),
    "unaligned": (unaligned(torch.randn(3, 4, 6)), 1e-5),
}
CALLS = {
    "batch_norm": lambda f, x, w, eps, **k: f.batch_norm(x, None, None, w, w, True, 0.1, eps, **k),
    "layer_norm": lambda f, x, w, eps, **k: f.layer_norm(x, (4, 6), w, w, eps, **k),
    "rms_norm": lambda f, x, w, eps, **k: f.rms_norm(x, (4, 6), w, eps, **k),
    "group_norm": lambda f, x, w, eps, **k: f.group_norm(x, 2, w, w, eps, **k),
    "instance_norm": lambda f, x, w, eps, **k: f.instance_norm(x, None, None, w, w, eps=eps, **k),
}


@pytest.mark.parametrize("shape", [(0,), ()], ids=str)
@pytest.mark.parametrize("name", ["batch_norm", "instance_norm", "group_norm"])
def test_too_few_axes(name, shape):
    def step(x, f):
        if name == "batch_norm":
            return f.batch_norm(x, torch.zeros(0), torch.ones(0), training=True)
        return f.group_norm(x, 1) if name == "group_norm" else f.instance_norm(x)

    found = []
    for f in nn.functional, fastbn.torch:
        program = torch.compile(partial(step, f=f), backend="aot_eager")
        try:
            found.append(program(torch.randn(shape)).shape)
        except Exception as error:
            found.append(type(error))
    assert found[0] == found[1]


@pytest.mark.parametrize("program", ["eager", "compiled"])
@pytest.mark.parametrize(("x", "eps"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("name", CALLS)
def test_what_the_kernels_refuse(name, x, eps, program):
    weight = torch.randn((4, 6) if name in ("layer_norm", "rms_norm") else (4,))
    dy = torch.randn(x.shape)

    def step(f, x, weight, **options):
        return CALLS[name](f, x, weight, eps, **options)

    ours = torch.compile(step, backend="aot_eager") if program == "compiled" else step
    found = []
    for call in (
        lambda x, weight: step(nn.functional, x, weight).relu(),
        lambda x, weight: ours(fastbn.torch, x, weight, activation="relu"),
    ):
        own, parameter = x.detach().requires_grad_(), weight.clone().requires_grad_()
        try:
            y = call(own, parameter)
            found.append((y, *torch.autograd.grad(y, (own, parameter), dy)))
        except (ValueError, RuntimeError, IndexError) as error:
            found.append(type(error))
    if isinstance(found[0], type):
        assert found[1] is found[0]
        return
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_exported():
    for strict in True, False:
        mine = model().eval()
        program = torch.export.export(mine, (X,), strict=strict)
        assert "fastbn.normalise" in program.graph_module.code
        torch.testing.assert_close(program.module()(X), mine(X))


def test_exported_with_any_batch():
    mine = model().eval()
    shapes = ({0: torch.export.Dim("batch", min=2)},)
    program = torch.export.export(mine, (X,), dynamic_shapes=shapes)
    x = torch.cat([X, X, X])
    torch.testing.assert_close(program.module()(x), mine(x))


def test_traced():
    mine = model().eval()
    traced = torch.jit.trace(mine, (X,))
    torch.testing.assert_close(traced(2 * X), mine(2 * X))
    graph = torch.fx.experimental.proxy_tensor.make_fx(mine)(X)
    assert "fastbn.normalise" in graph.code


# ---- other processes ----------------------------------------------------------------------

WORK = """
import os, torch, fastbn.torch
from torch import nn

class Data(torch.utils.data.Dataset):
    norm = fastbn.torch.BatchNorm1d(64).eval()
    x = torch.linspace(-1, 1, 1 << 18).view(64, 64, 64)

    def __len__(self):
        return 8

    def __getitem__(self, i):
        with torch.no_grad():
            return self.norm(self.x)[i]

def work(queue):
    queue.put(Data()[0].sum().item())

if __name__ == "__main__":
    torch.set_num_threads(2)
    expected = torch.stack([Data()[i] for i in range(8)])
"""


def test_workers_of_a_data_loader():
    code = (
        WORK
        + """
    data = torch.utils.data.DataLoader(Data(), batch_size=4, num_workers=2)
    print(torch.equal(torch.cat(list(data)), expected))
"""
    )
    assert run(code) == "True"


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing(method, tmp_path):
    file = tmp_path / "program.py"
    file.write_text(
        WORK
        + f"""
    context = torch.multiprocessing.get_context("{method}")
    queue = context.Queue()
    process = context.Process(target=work, args=(queue,))
    process.start()
    value = queue.get(timeout=60)
    process.join()
    print(process.exitcode, value == expected[0].sum().item())
"""
    )
    code = f"import runpy; runpy.run_path({str(file)!r}, run_name='__main__')"
    if method == "spawn":
        code = (
            f"import subprocess, sys; subprocess.run([sys.executable, {str(file)!r}], check=True)"
        )
    assert run(code) == "0 True"


def test_pytorch_is_imported_only_on_demand():
    assert run("import fastbn, sys; print('torch' in sys.modules)") == "False"
    code = """
import sys
sys.modules["torch"] = None
import fastbn
try:
    import fastbn.torch
except ImportError as error:
    print(error)
"""
    assert run(code) == "fastbn.torch needs PyTorch: python -m pip install 'fastbn[torch]'"


def test_one_openmp():
    code = """
import fastbn.torch, torch
torch.ones(1 << 22).sum()
fastbn.torch.batch_norm(torch.ones(64, 64, 64), None, None, training=True)
with open("/proc/self/maps") as maps:
    print(len({line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line}))
"""
    assert run(code) == "1"


# ---- documentation ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["functional", "modules", "convert"])
def test_docstrings(name):
    module = importlib.import_module(f"fastbn.torch.{name}")
    found = doctest.testmod(module)
    assert found.attempted
    assert found.failed == 0

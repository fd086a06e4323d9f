# SPDX-License-Identifier: BSD-3-Clause
"""fastbn.torch's functions in programs: compiled, faked, transformed; in other processes; docs."""

import doctest
import importlib
import itertools
from functools import partial

import numpy as np
import pytest
from processes import run
from tensors import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional

import fastbn.torch

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit")

CALLS = {
    "batch_norm": lambda f, x, w, eps, **k: f.batch_norm(x, None, None, w, w, True, 0.1, eps, **k),
    "layer_norm": lambda f, x, w, eps, **k: f.layer_norm(x, w.shape, w, w, eps, **k),
    "rms_norm": lambda f, x, w, eps, **k: f.rms_norm(x, w.shape, w, eps, **k),
    "group_norm": lambda f, x, w, eps, **k: f.group_norm(x, 2, w, w, eps, **k),
    "instance_norm": lambda f, x, w, eps, **k: f.instance_norm(x, None, None, w, w, eps=eps, **k),
}
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)


# ---- the same values -------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_compiled_functions(name):
    x, residual, v = (torch.randn(3, 4, 5, 4, dtype=torch.float64) for _ in range(3))
    weight = torch.randn(4, dtype=torch.float64)

    def call(x, weight, residual):
        return CALLS[name](
            fastbn.torch, x, weight, 1e-5, activation="leaky_relu", negative_slope=0.2,
            residual=residual,
        )  # fmt: skip

    def expected(x, weight, residual):
        y = CALLS[name](functional, x, weight, 1e-5) + residual
        return functional.leaky_relu(y, 0.2)

    def loss(call, *given):
        return call(*given).pow(3).sum()

    mapped = lambda f: torch.func.vmap(f, in_dims=(None, None, 0))  # noqa: E731
    # Compiled, PyTorch's own norms with a weight have no forward mode.
    tangent = lambda f: lambda x, w, r: torch.func.jvp(lambda s: f(s, w, r), (x,), (v,))  # noqa: E731
    for transform in [
        lambda f: f,
        tangent,
        lambda f: torch.func.grad(partial(loss, f), argnums=(0, 1, 2)),
        mapped,
    ]:
        given = x, weight, torch.stack([residual, v]) if transform is mapped else residual
        correct = transform(expected)(*given)
        torch.testing.assert_close(transform(call)(*given), correct)
        if transform is not tangent:
            torch.testing.assert_close(compiled(transform(call))(*given), correct)
    given = [t.clone().requires_grad_() for t in (x, weight, residual)]
    found = [torch.autograd.grad(loss(f, *given), given) for f in (compiled(call), call, expected)]
    torch.testing.assert_close(found[0], found[2])
    torch.testing.assert_close(found[1], found[2])


@pytest.mark.parametrize("program", ["eager", "compiled"])
def test_running_statistics(program):
    found = []
    for f in fastbn.torch, functional:
        x, mean, var = torch.linspace(0, 9, 60).view(5, 4, 3), torch.zeros(4), torch.ones(4)

        def step(x, mean, var, f=f):
            return f.batch_norm(x, mean, var, None, None, True, 0.3)

        y = (compiled(step) if program == "compiled" else step)(x, mean, var)
        found.append([y, mean, var])
    torch.testing.assert_close(*found)


def test_inductor_in_lower_precision():
    """At most a step of bfloat16 from the eager result: inductor rounds less often."""
    block = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
    block = fastbn.torch.convert(block.eval(), fuse=True)
    x = torch.randn(4, 8, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y, expected = torch.compile(block, backend="aot_eager")(x), block(x)
    assert y.dtype is expected.dtype
    torch.testing.assert_close(y, expected, rtol=2**-7, atol=0)


# ---- what a graph knows of a result -------------------------------------------------------------


def outcome(name, f, x, weight, residual, activation):
    """Dtypes and devices of y and of gradients, strides of y; or the kind of error."""
    given = [t.requires_grad_() for t in (x, weight, residual) if t is not None]
    try:
        if f is functional:
            y = CALLS[name](f, x, weight, 1e-5)
            y = y if residual is None else y + residual
            y = y if activation is None else functional.silu(y)
        else:
            y = CALLS[name](f, x, weight, 1e-5, activation=activation, residual=residual)
        found = y, *torch.autograd.grad(y.sum(), given)
    except (RuntimeError, TypeError) as error:
        return type(error)
    # The memory order of a gradient is nobody's promise.
    return [(t.dtype, t.shape, t.stride() if t is y else None, t.device.type) for t in found]


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("name", CALLS)
def test_fake_results_are_like_real_ones(name, layout):
    base = torch.randn(3, 4, 5, 4)
    if layout == "channels_last":
        base = base.to(memory_format=torch.channels_last)
    elif layout == "sliced":
        base = torch.randn(3, 8, 5, 4)[:, ::2]
    different = []
    kinds = [torch.float32, torch.float64, torch.bfloat16]
    for of_x, of_weight, of_residual in itertools.product(kinds, kinds, [None, *kinds]):
        x, weight = base.to(of_x), torch.ones(4, dtype=of_weight)
        residual = None if of_residual is None else base.to(of_residual)
        activation = "silu" if of_x is not of_weight else None
        mode = FakeTensorMode()
        real, fake = [], []
        for f in fastbn.torch, functional:
            given = [t if t is None else t.detach() for t in (x, weight, residual)]
            real.append(outcome(name, f, *given, activation))
            given = [t if t is None else mode.from_tensor(t.detach())
                     for t in (x, weight, residual)]  # fmt: skip
            with mode:
                fake.append(outcome(name, f, *given, activation))
        # PyTorch's own fakes do not know all strides and errors of its kernels.
        if fake[0] != fake[1] or (real[1] == fake[1] and real[0] != fake[0]):
            different.append((of_x, of_weight, of_residual, activation, real, fake))
    assert not different, different[:3]


# ---- what the kernels refuse -------------------------------------------------------------


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

    ours = compiled(step) if program == "compiled" else step
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
        wrapped = program == "compiled" and found[1] is torch._dynamo.exc.TorchRuntimeError
        assert found[1] is found[0] or wrapped
        return
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


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


@pytest.mark.parametrize("name", ["functional", "modules", "convert", "fuse"])
def test_docstrings(name):
    module = importlib.import_module(f"fastbn.torch.{name}")
    found = doctest.testmod(module)
    assert found.attempted
    assert found.failed == 0

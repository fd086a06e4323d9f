# SPDX-License-Identifier: BSD-3-Clause
"""What users do with PyTorch's norms: the same before, with and after fastbn.torch.enable()."""

import copy
import io
import shutil
import warnings

import pytest
from processes import run
from tensors import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import fastbn.torch

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit", "ignore:.*torch.ao.quantization", "ignore::torch.jit.TracerWarning"
)
X = torch.randn(8, 6, 5, 5, generator=torch.Generator().manual_seed(3))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1),
        nn.InstanceNorm2d(4, affine=True), nn.GroupNorm(2, 4), nn.Flatten(1), nn.LayerNorm(36),
        nn.BatchNorm1d(36, momentum=None),
    )  # fmt: skip


def norm(x, weight=None):
    return functional.batch_norm(x, None, None, weight, None, True)


def step(model, x=X):
    """The result, the gradients and the buffers of a step of training."""
    own = x.clone().requires_grad_()
    y = model(own)
    loss = y.float().pow(2).mul(torch.linspace(0, 1, y.numel()).view(y.shape)).sum()
    loss.backward()
    return [y.detach(), own.grad, *(p.grad for p in model.parameters()), *model.buffers()]


def evaluated(model):
    model = model.eval()
    with torch.no_grad():
        return model(X)


def lowered():
    with torch.autocast("cpu", torch.bfloat16):
        return step(network())


def inference_mode():
    with torch.inference_mode():
        return network()(X).clone()


def checkpointed():
    model = network()
    return step(Wrapped(lambda x: checkpoint(model, x, use_reentrant=False), model))


class Wrapped(nn.Module):
    def __init__(self, function, model):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, x):
        return self.function(x)


def saved_on_cpu():
    with torch.autograd.graph.save_on_cpu():
        return step(network())


def hooked():
    seen, model = [], network()
    model[1].register_forward_hook(lambda m, a, y: seen.append(y.detach().clone()))
    model[1].register_full_backward_hook(lambda m, a, y: seen.append(y[0].clone()))
    return [*step(model), *seen]


def parametrized():
    model = network()
    parametrize.register_parametrization(model[1], "weight", nn.Softplus())
    return step(model)


def jvp():
    return torch.func.jvp(norm, (X,), (X.cos(),))


def hessian():
    x = X[:3, :2, 0, 0].double()
    return torch.func.hessian(lambda t: norm(t).pow(3).sum())(x)


def per_sample():
    model = network().eval()
    parameters = dict(model.named_parameters())
    buffers = dict(model.named_buffers())

    def loss(given, x):
        return torch.func.functional_call(model, (given, buffers), x[None]).pow(2).sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, X)
    return [*found.values()]


def double_backward():
    x = X.double().requires_grad_()
    weight = torch.ones(6, dtype=torch.float64, requires_grad=True)
    first = torch.autograd.grad(norm(x, weight).pow(3).sum(), x, create_graph=True)[0]
    return torch.autograd.grad(first.pow(2).sum(), (x, weight))


def compiled():
    torch._dynamo.reset()
    return step(torch.compile(network(), backend="aot_eager"))


def compiled_by_inductor():
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler")
    torch._dynamo.reset()
    return step(torch.compile(network()))


def exported():
    return torch.export.export(network().eval(), (X,)).module()(X)


def traced():
    return torch.jit.trace(network().eval(), X)(X)


def scripted():
    return torch.jit.script(network().eval())(X)


def traced_by_fx():
    return step(torch.fx.symbolic_trace(network()))


def fused_by_pytorch():
    model = network().eval()
    merged = torch.ao.quantization.fuse_modules(model, ["0", "1", "2"])
    return evaluated(merged)


def folded_by_pytorch():
    model = network().eval()
    return torch.nn.utils.fusion.fuse_conv_bn_eval(model[0], model[1])(X)


def statistics_anew():
    model = network()
    torch.optim.swa_utils.update_bn([X, X + 1], model)
    return [*model.buffers()]


def averaged():
    model = torch.optim.swa_utils.AveragedModel(network(), use_buffers=True)
    model.update_parameters(network())
    return evaluated(model)


def copied():
    model, stream = network(), io.BytesIO()
    step(model)
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    other = copy.deepcopy(model)
    other.load_state_dict(torch.load(stream))
    return [evaluated(other), *other.buffers()]


def shared():
    return step(network().share_memory())


def by_other_names():
    mean, var = torch.zeros(6), torch.ones(6)
    found = [torch.native_batch_norm(X, None, None, mean, var, True, 0.1, 1e-5)[0]]
    found += torch.ops.aten._native_batch_norm_legit_functional(
        X, None, None, mean, var, True, 0.1, 1e-5)[::3]  # fmt: skip
    found += torch.ops.aten._native_batch_norm_legit.no_stats(X, None, None, True, 0.1, 1e-5)[:1]
    found += torch.ops.aten._batch_norm_with_update(X, None, None, mean, var, 0.1, 1e-5)[:1]
    y, m, s = torch.empty_like(X), torch.empty(6), torch.empty(6)
    torch.native_batch_norm(X, None, None, mean, var, True, 0.1, 1e-5, out=(y, m, s))
    return [*found, y, m, s, mean, var]


PROGRAMS = {
    "a step": lambda: step(network()),
    "channels_last": lambda: step(network(), X.to(memory_format=torch.channels_last)),
    "float64": lambda: step(network().double(), X.double()),
    "three axes": lambda: step(nn.BatchNorm1d(6), X.flatten(2)),
    "five axes": lambda: step(nn.BatchNorm3d(6), X[..., None]),
    "no statistics": lambda: step(nn.BatchNorm2d(6, track_running_stats=False)),
    "no parameters": lambda: step(nn.BatchNorm2d(6, affine=False)),
    "evaluation": lambda: evaluated(network()),
    "gradients in evaluation": lambda: step(network().eval()),
} | {
    f.__name__: f
    for f in (
        lowered, inference_mode, checkpointed, saved_on_cpu, hooked, parametrized, jvp, hessian,
        per_sample, double_backward, compiled, compiled_by_inductor,
        exported, traced, scripted, traced_by_fx,
        fused_by_pytorch, folded_by_pytorch, statistics_anew, averaged, copied, shared,
        by_other_names,
    )
}  # fmt: skip


def flat(found):
    return [found] if isinstance(found, torch.Tensor) else list(found)


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_programs(program):
    before = flat(program())
    with warnings.catch_warnings(), fastbn.torch.enabled():
        on = flat(program())
    after = flat(program())
    low = torch.bfloat16 in {t.dtype for t in before} or program is lowered
    for a, b, c in zip(before, on, after, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        near = 0.1 if low else 1e-4
        torch.testing.assert_close(b, a, rtol=near, atol=near)
        assert torch.equal(a, c)


WRONG = {
    "one value": (lambda: nn.BatchNorm1d(3)(torch.ones(1, 3))),
    "channels": (lambda: nn.BatchNorm2d(3)(X)),
    "rank": (lambda: nn.BatchNorm2d(6)(X[0])),
    "integers": (lambda: norm(X.int())),
    "mixed": (lambda: norm(X, torch.ones(6, dtype=torch.float64))),
    "weight": (lambda: norm(X, torch.ones(5))),
    "gradient of statistics": lambda: functional.batch_norm(
        X, torch.zeros(6, requires_grad=True), torch.ones(6), training=True),
    "another device": lambda: nn.BatchNorm2d(6)(X.to("meta")),
}  # fmt: skip


@pytest.mark.parametrize("program", WRONG.values(), ids=WRONG)
def test_errors_in_kind_and_words(program):
    found = []
    for state in False, True:
        if state:
            fastbn.torch.enable()
        try:
            program()
        except Exception as error:
            found.append((type(error), str(error).partition("\n")[0]))
        finally:
            fastbn.torch.disable()
    assert len(found) == 2
    assert found[0] == found[1]


def test_processes_and_workers():
    program = """
import os, torch, torch.distributed as distributed, fastbn.torch
fastbn.torch.enable()
layer, x = torch.nn.BatchNorm2d(3), torch.randn(8, 3, 64, 64)
expected = layer(x)
child = os.fork()
if not child:
    # PyTorch's own operators would wait for threads that a child has not.
    here, there = layer(x)[0, 0, 0, 0].item(), expected[0, 0, 0, 0].item()
    os._exit(abs(here - there) > 1e-6)
assert os.waitpid(child, 0)[1] == 0
class Data(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, i): return layer(x[i : i + 1, :, :8])[0, 0, 0, 0].detach()
assert len(list(torch.utils.data.DataLoader(Data(), num_workers=1))) == 4
distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
model = torch.nn.parallel.DistributedDataParallel(torch.nn.BatchNorm2d(3))
assert torch.allclose(model(x), expected, atol=1e-6)
model(x).sum().backward()
kind = torch.nn.SyncBatchNorm.convert_sync_batchnorm(torch.nn.BatchNorm2d(3))
assert type(kind) is torch.nn.SyncBatchNorm
distributed.destroy_process_group()
print("ok")
"""
    assert run(program).strip().endswith("ok")

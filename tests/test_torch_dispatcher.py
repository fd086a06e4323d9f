# SPDX-License-Identifier: BSD-3-Clause
"""fastbn's kernels in PyTorch's dispatcher: batch norm beside PyTorch's own."""

import copy
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext

import numpy
import pytest
from tensors import DTYPES, torch
from torch.nn import functional

import fastbn
import fastbn.torch

LAYOUTS = [
    ((4, 5), None),
    ((4, 5, 7), None),
    ((3, 5, 4, 6), None),
    ((3, 5, 4, 6), torch.channels_last),
    ((2, 3, 2, 3, 4), torch.channels_last_3d),
]


def state(on):
    return fastbn.torch.enabled() if on else nullcontext()


def step(shape, order, dtypes, training, forward_on, backward_on):
    """Return what a layer computes, with the kernels on or off in each half."""
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtypes[0])
    if order is not None:
        x = x.contiguous(memory_format=order)
    x.requires_grad_()
    layer = torch.nn.BatchNorm1d(shape[1])
    layer._check_input_dim = lambda x: None
    layer.to(dtypes[1]).train(training)
    dy = torch.randn(shape).to(dtypes[0])
    with state(forward_on):
        y = layer(x)
    with state(backward_on):
        y.backward(dy)
    return [y.detach(), x.grad, layer.weight.grad, layer.bias.grad,
            layer.running_mean, layer.running_var]  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "order"), LAYOUTS, ids=str)
def test_both_states_in_each_half(shape, order, dtypes, training):
    expected = step(shape, order, dtypes, training, False, False)
    for halves in (True, True), (True, False), (False, True):
        for new, old in zip(step(shape, order, dtypes, training, *halves), expected, strict=True):
            assert new.dtype == old.dtype
            assert new.stride() == old.stride()
            tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}.get(dtypes[0], 4e-2)
            torch.testing.assert_close(new, old, rtol=tolerance, atol=tolerance)


def test_the_kernels_run():
    x = torch.randn(3, 5, 4, 6) + 1e4
    with fastbn.torch.enabled():
        y = functional.batch_norm(x, None, None, training=True)
    assert numpy.array_equal(y.numpy(), fastbn.batch_norm(x.numpy(), None, None, training=True))


def errors():
    return {
        "integers": lambda: torch.native_batch_norm(
            torch.ones(2, 3, dtype=torch.int32), None, None, None, None, True, 0.1, 1e-5
        ),
        "one axis": lambda: torch.native_batch_norm(
            torch.ones(3), None, None, None, None, True, 0.1, 1e-5
        ),
        "weight": lambda: functional.batch_norm(
            torch.ones(2, 3, 4), None, None, torch.ones(4), training=True
        ),
        "mixed": lambda: functional.batch_norm(
            torch.ones(2, 3, 4), None, None, torch.ones(3).double(), training=True
        ),
        "halves": lambda: functional.batch_norm(
            torch.ones(2, 3, 4).half(), None, None, torch.ones(3).half(), torch.ones(3), True
        ),
    }


def outcome(call):
    try:
        return [t.shape for t in call()]
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("name", errors())
def test_errors_are_pytorchs(name, capfd):
    call = errors()[name]
    before = outcome(call)
    with fastbn.torch.enabled():
        assert outcome(call) == before
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("way", ["plain", "deepcopy", "save_on_cpu"])
def test_dx_at_a_large_mean(way):
    torch.manual_seed(0)
    x64 = torch.randn(8, 4, 10, dtype=torch.float64) + 1e4
    x = x64.float().requires_grad_()
    x64 = x.detach().double().requires_grad_()
    dy = torch.randn(8, 4, 10)
    functional.batch_norm(x64, None, None, training=True).backward(dy.double())
    hooks = torch.autograd.graph.saved_tensors_hooks(copy.deepcopy, lambda t: t)
    if way != "deepcopy":
        hooks = torch.autograd.graph.save_on_cpu() if way == "save_on_cpu" else nullcontext()
    with fastbn.torch.enabled(), hooks:
        functional.batch_norm(x, None, None, training=True).backward(dy)
    loss = (x.grad - x64.grad).abs().max() / x64.grad.abs().max()
    # save_on_cpu copies the elements: what remains is PyTorch's own accuracy.
    assert loss < (1e-3 if way == "save_on_cpu" else 1e-6)


def test_gradients_of_gradients():
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, dtype=torch.float64, requires_grad=True)
    with fastbn.torch.enabled():
        f = lambda x, w: functional.batch_norm(x, None, None, w, training=True)  # noqa: E731
        assert torch.autograd.gradcheck(f, (x, w))
        assert torch.autograd.gradgradcheck(f, (x, w))


def test_counted_and_nested():
    assert not fastbn.torch.is_enabled()
    fastbn.torch.disable()
    with fastbn.torch.enabled():
        with fastbn.torch.enabled():
            pass
        assert fastbn.torch.is_enabled()
        fastbn.torch.enable()
        fastbn.torch.enable()
    assert not fastbn.torch.is_enabled()
    fastbn.torch.enable()
    with fastbn.torch.enabled():
        fastbn.torch.disable()
    assert fastbn.torch.is_enabled()
    assert "native_batch_norm" in fastbn.show_config()["torch_operators"]
    fastbn.torch.disable()
    assert fastbn.show_config()["torch_operators"] == []


def test_a_block_of_another_thread_goes_on():
    entered, leave = threading.Event(), threading.Event()

    def block():
        with fastbn.torch.enabled():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=block)
    thread.start()
    entered.wait(10)
    with fastbn.torch.enabled():
        pass
    assert fastbn.torch.is_enabled()
    leave.set()
    thread.join()
    assert not fastbn.torch.is_enabled()


def test_twenty_times_change_nothing():
    x, layer = torch.randn(4, 8, 6, 6) + 100, torch.nn.BatchNorm2d(8)
    before = layer(x)
    with fastbn.torch.enabled():
        table = torch._C._dispatch_dump("aten::native_batch_norm")
    for _ in range(20):
        with fastbn.torch.enabled():
            assert not torch.equal(layer(x), before)
        assert torch.equal(layer(x), before)
    assert torch._C._dispatch_dump("aten::native_batch_norm") == table


def test_switched_while_other_threads_compute():
    program = """
import threading, time, torch, fastbn.torch
with fastbn.torch.enabled(): pass
ends = time.time() + 1.5
def work():
    layer, x = torch.nn.BatchNorm2d(8), torch.randn(4, 8, 6, 6, requires_grad=True)
    while time.time() < ends: layer(x).sum().backward()
threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads: thread.start()
while time.time() < ends:
    with fastbn.torch.enabled(): pass
for thread in threads: thread.join()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(sys.platform == "win32", reason="no timers that send signals")
def test_what_a_handler_of_a_signal_raises_arrives():
    class StopError(Exception):
        pass

    def stop(*arguments):
        raise StopError

    with fastbn.torch.enabled():
        pass
    x, w = torch.randn(500, 500, requires_grad=True), torch.randn(500, 500) / 25
    y = functional.batch_norm(x, None, None, training=True)
    for _ in range(50):
        y = y @ w
    y = y.sum()

    def backward_forever():
        while True:
            y.backward(retain_graph=True)

    before = signal.signal(signal.SIGALRM, stop)
    try:
        # The time goes to the products; the norm's backward follows without Python between.
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(StopError):
            backward_forever()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_nothing_by_import_and_no_warning():
    program = (
        "import torch, fastbn.torch; d = torch._C._dispatch_dump; "
        "before = d('aten::native_batch_norm'); assert not fastbn.torch.is_enabled(); "
        "fastbn.torch.disable(); assert d('aten::native_batch_norm') == before; "
        "fastbn.torch.enable(); fastbn.torch.disable()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")

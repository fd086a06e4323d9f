# SPDX-License-Identifier: BSD-3-Clause
"""fastbn.torch's functions beside PyTorch's: on its own samples, and their derivatives."""

import signal
import threading

import numpy as np
import pytest
from tensors import NAMES, OPS, array, assert_same, cloned, function, nodes, results, torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as theirs
from torch.utils.checkpoint import checkpoint

import fastbn
import fastbn.torch
from fastbn.torch import _direct, _formulas

# PyTorch's own, of its forward mode.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit")
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
#: A call of each function with tensors x, weight, bias of six channels, or features.
CALLS = {
    "batch_norm": lambda f, x, w, b, **k: f.batch_norm(x, None, None, w, b, True, **k),
    "layer_norm": lambda f, x, w, b, **k: f.layer_norm(x, x.shape[-1:], w, b, **k),
    "rms_norm": lambda f, x, w, b, **k: f.rms_norm(x, x.shape[-1:], w, 1e-5, **k),
    "group_norm": lambda f, x, w, b, **k: f.group_norm(x, 3, w, b, **k),
    "instance_norm": lambda f, x, w, b, **k: f.instance_norm(x, weight=w, bias=b, **k),
}
ACTIVATIONS = {
    None: lambda y: y,
    "relu": theirs.relu,
    "relu6": theirs.relu6,
    "leaky_relu": lambda y: theirs.leaky_relu(y, 0.2),
    "silu": theirs.silu,
    "hardswish": theirs.hardswish,
    # PyTorch's own gradient has a sixth in float32 for float64, too.
    "hardsigmoid": lambda y: theirs.relu6(y + 3) / 6,
}


def tensors(dtype=torch.float32, seed=0, shape=(4, 6, 5, 6)):
    generator = torch.Generator().manual_seed(seed)
    shapes = shape, (shape[1],), (shape[1],)
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


@pytest.fixture
def no_way_back(monkeypatch):
    """Nothing is left to PyTorch's operators."""

    def refuse(*_):
        raise AssertionError("left to PyTorch")

    monkeypatch.setattr(_formulas, "normalise", refuse)
    monkeypatch.setattr(_formulas, "gradients", refuse)


# ---- PyTorch's samples ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_samples(name, dtype):
    for sample in OPS[name].sample_inputs("cpu", dtype, requires_grad=True):
        found = []
        for call in function(name), OPS[name]:
            args = [cloned(a) for a in (sample.input, *sample.args)]
            kwargs = {k: cloned(v) for k, v in sample.kwargs.items()}
            found.append(results(lambda: call(*args, **kwargs), [*args, *kwargs.values()]))  # noqa: B023
        assert_same(*found, dtype)


@pytest.mark.parametrize("name", NAMES)
def test_errors(name):
    for case in OPS[name].error_inputs("cpu") if OPS[name].error_inputs_func else ():
        sample = case.sample_input
        with pytest.raises(case.error_type, match=case.error_regex):
            function(name)(sample.input, *sample.args, **sample.kwargs)


@pytest.mark.parametrize("name", NAMES)
def test_derivatives(name):
    op = OPS[name]
    for sample in list(op.sample_inputs("cpu", torch.float64, requires_grad=True))[:5]:
        given = [sample.input, *sample.args, *sample.kwargs.values()]
        names = list(sample.kwargs)
        places = [i for i, a in enumerate(given) if isinstance(a, torch.Tensor) and a.requires_grad]

        def call(*changed):
            changed = dict(zip(places, changed, strict=True))  # noqa: B023
            values = [changed.get(i, cloned(a)) for i, a in enumerate(given)]  # noqa: B023
            plain = len(values) - len(names)  # noqa: B023
            kwargs = dict(zip(names, values[plain:], strict=True))  # noqa: B023
            return function(name)(*values[:plain], **kwargs)

        wanted = [given[i] for i in places]
        assert torch.autograd.gradcheck(
            call, wanted, check_batched_grad=op.check_batched_grad,
            check_forward_ad=op.supports_forward_ad, fast_mode=True,
        )  # fmt: skip
        assert torch.autograd.gradgradcheck(call, wanted, fast_mode=True)


# ---- the kernels ------------------------------------------------------------------------


@pytest.mark.usefixtures("no_way_back")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded"])
@pytest.mark.parametrize("name", NAMES)
def test_the_bits_are_those_of_the_arrays(name, layout, dtype):
    x, weight, bias = (t.detach() for t in tensors(dtype))
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = x.repeat(1, 1, 2, 2)[::2, :, ::2, ::2]
    elif layout == "expanded":
        x = x[:1].expand(4, -1, -1, -1)
    x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
    y = CALLS[name](fastbn.torch, x, weight, bias)
    y.backward(torch.ones_like(y))
    # What is no vector in the memory of these becomes one in PyTorch's order.
    rows = name in ("layer_norm", "rms_norm", "instance_norm")
    arrays = [array(t.contiguous() if rows else t) for t in (x, weight, bias)]
    mine = {
        "batch_norm": lambda f, x, w, b: f(x, w, b),
        "layer_norm": lambda f, x, w, b: f(x, 6, w, b),
        "rms_norm": lambda f, x, w, b: f(x, 6, w, 1e-5),
        "group_norm": lambda f, x, w, b: f(x, 3, w, b),
        "instance_norm": lambda f, x, w, b: f(x, w, b),
    }[name](getattr(fastbn, f"{name}_forward"), *arrays)
    np.testing.assert_array_equal(array(y), mine[0])
    given = np.ones_like(arrays[0]), arrays[0], *mine[1:]
    sizes = {"layer_norm": (6,), "rms_norm": (6,), "group_norm": (3,)}.get(name, ())
    gradients = getattr(fastbn, f"{name}_backward")(*given, *sizes, arrays[1])
    for tensor, gradient in zip((x, weight, bias), gradients, strict=False):
        np.testing.assert_array_equal(array(tensor.grad), gradient)
        assert tensor.grad.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_fused(name, activation, residual, dtype):
    found = []
    for f in fastbn.torch, theirs:
        x, weight, bias = tensors(dtype)
        given = [x, weight] if name == "rms_norm" else [x, weight, bias]
        added = torch.full_like(x, 0.3, requires_grad=True) if residual else None
        if f is theirs:
            with torch.no_grad():
                given = [t.double().requires_grad_() for t in given]
                added = added.double().requires_grad_() if residual else None
            y = CALLS[name](theirs, *(given if len(given) == 3 else [*given, None]))
            y = ACTIVATIONS[activation](y + added if residual else y)
        else:
            y = CALLS[name](
                f, x, weight, bias, activation=activation, negative_slope=0.2, residual=added
            )
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape))
        everything = [y, *(t.grad for t in given), *([added.grad] if residual else [])]
        found.append([t.detach().to(dtype) for t in everything])
    assert_same(*found, dtype)


@pytest.mark.parametrize("activation", ["silu", "leaky_relu"])
@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_of_fused_calls(name, activation):
    x, weight, bias = tensors(torch.float64, shape=(3, 3, 2, 3))
    residual = torch.randn_like(x).requires_grad_()

    def call(x, weight, residual):
        return CALLS[name](fastbn.torch, x, weight, bias, activation=activation, residual=residual)

    for check in torch.autograd.gradcheck, torch.autograd.gradgradcheck:
        assert check(call, (x, weight, residual), fast_mode=True)


def test_frozen_statistics_have_second_derivatives():
    x, weight, bias = tensors(torch.float64, shape=(3, 2, 4))
    mean, var = torch.randn(2, dtype=torch.float64), torch.rand(2, dtype=torch.float64) + 0.5

    def call(*given):
        return fastbn.torch.batch_norm(given[0], mean, var, *given[1:], activation="silu")

    assert torch.autograd.gradcheck(call, (x, weight, bias))
    assert torch.autograd.gradgradcheck(call, (x, weight, bias))


def test_a_residual_of_another_shape_is_added_as_pytorch_does():
    x, weight, bias = tensors()
    other = torch.randn(6, 1, 1)
    y = fastbn.torch.batch_norm(x, None, None, weight, bias, True, residual=other)
    expected = theirs.batch_norm(x, None, None, weight, bias, True) + other
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_an_unknown_activation(call):
    with pytest.raises(ValueError, match=r"activation: expected None, 'relu', .*got 'tanh'"):
        call(fastbn.torch, *tensors(), activation="tanh")


@pytest.mark.parametrize(
    ("error", "options"),
    [(ValueError, {"activation": "tanh"}), (RuntimeError, {"residual": torch.ones(7)})],
)
def test_errors_leave_running_statistics_alone(error, options):
    x, running = torch.randn(4, 6, 5, 6), (torch.zeros(6), torch.ones(6))
    for norm in "batch_norm", "instance_norm":
        with pytest.raises(error):
            getattr(fastbn.torch, norm)(x, *running, None, None, True, **options)
        assert not running[0].any()
        assert running[1].eq(1).all()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("batch_norm", {"eps": None}),
        ("layer_norm", {"eps": None}),
        ("group_norm", {"num_groups": -1}),
        ("group_norm", {"num_groups": 2**40}),
        ("group_norm", {"num_groups": 0}),
        ("group_norm", {"input": torch.tensor(1.0, requires_grad=True)}),
        ("group_norm", {"input": torch.randn(6, requires_grad=True), "weight": torch.ones(6)}),
        ("batch_norm", {"weight": [1.0] * 6}),
        ("layer_norm", {"weight": [1.0] * 6}),
        ("batch_norm", {"running_mean": torch.zeros(6, dtype=torch.int32)}),
        ("batch_norm", {"weight": torch.ones(6, dtype=torch.complex64)}),
        ("layer_norm", {"weight": torch.ones(6, dtype=torch.int64)}),
    ],
)
def test_errors_are_those_of_pytorch(name, arguments):
    x = torch.randn(4, 6, 5, 6, requires_grad=True)
    given = {
        "batch_norm": {"running_mean": torch.zeros(6), "running_var": torch.ones(6),
                       "training": True},
        "layer_norm": {"normalized_shape": (6,)},
        "group_norm": {"num_groups": 3},
    }[name]  # fmt: skip
    given = {"input": x} | given | arguments
    with pytest.raises(Exception) as expected:  # noqa: PT011  whatever it is
        getattr(theirs, name)(**given)
    with pytest.raises(expected.type):
        getattr(fastbn.torch, name)(**given)


def test_a_tracer_sees_backward():
    x, weight, bias = (t.requires_grad_() for t in tensors(torch.float32))
    y = CALLS["batch_norm"](fastbn.torch, x, weight, bias, activation="silu")

    def gradient(dy):
        return torch.autograd.grad(y, x, dy, retain_graph=True)[0]

    program = make_fx(gradient)(torch.randn_like(y))
    dy = torch.randn_like(y)
    torch.testing.assert_close(program(dy), gradient(dy), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_what_is_no_tensor(call):
    _, weight, bias = tensors()
    with pytest.raises((TypeError, AttributeError)) as theirs_:
        call(theirs, [1.0, 2.0], weight, bias)
    with pytest.raises(theirs_.type):
        call(fastbn.torch, [1.0, 2.0], weight, bias)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no alarms here")
def test_a_signal_ends_a_long_call():
    def handler(*_):
        raise InterruptedError

    x = torch.randn(1, 8, 512, 512).expand(64, -1, -1, -1)
    mean, var = torch.zeros(8), torch.ones(8)
    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        with pytest.raises(InterruptedError):
            fastbn.torch.batch_norm(x, mean, var, training=True)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    # Else the call was over before Python looked.
    assert not mean.any()
    assert var.eq(1).all()


# ---- memory -------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_way_back")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", NAMES)
def test_no_tensor_is_copied(name, layout, dtype, monkeypatch):
    made = []
    monkeypatch.setattr(_direct, "empty_like", lambda t: made.append(t) or torch.empty_like(t))
    x, weight, bias = (t.detach() for t in tensors(dtype))
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    y = CALLS[name](fastbn.torch, x.requires_grad_(), weight.requires_grad_(), bias)
    y.backward(torch.ones_like(y))
    copied = layout == "channels_last" and name in ("layer_norm", "rms_norm", "instance_norm")
    # Else it is y, dx and the gradients of parameters. The results of these three are
    # contiguous, as PyTorch's are.
    assert copied or len(made) <= 4


@pytest.mark.parametrize("name", NAMES)
def test_the_memory_format_is_that_of_pytorch(name):
    x = torch.randn(4, 6, 8, 6)
    layouts = [
        x, x.to(memory_format=torch.channels_last), x.permute(0, 2, 1, 3)[:, :6],
        x[:, :, ::2], x.to(memory_format=torch.channels_last)[:, :, ::2],
        x[:1].expand(4, 6, 8, 6), x[0].movedim(0, 2).unsqueeze(0).movedim(3, 1),
        x[:, :, :, 0], x[:, :, :, 0].transpose(1, 2)[:, :6], x.unsqueeze(3),
        x.unsqueeze(3).to(memory_format=torch.channels_last_3d),
    ]  # fmt: skip
    for x in layouts:
        weight, bias = torch.ones(x.shape[-1]), torch.ones(x.shape[-1])
        if name not in ("layer_norm", "rms_norm"):
            weight, bias = torch.ones(x.shape[1]), torch.ones(x.shape[1])
        y, expected = (CALLS[name](f, x, weight, bias) for f in (fastbn.torch, theirs))
        # Of an axis of length 1 the stride means nothing.
        steps = [
            [s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1] for t in (y, expected)
        ]
        assert steps[0] == steps[1], x.stride()
        torch.testing.assert_close(y, expected)


SHAPES_WITH_ONES = [(2, 3, 8, 1), (2, 3, 1, 8), (1, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 4, 1)]


@pytest.mark.parametrize("order", ["axes", "channels last", "strides of a view"])
@pytest.mark.parametrize("shape", SHAPES_WITH_ONES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_memory_format_where_sizes_of_1_leave_it_open(name, shape, order):
    x = torch.randn(shape)
    if order == "channels last":
        channels_last = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
        x = x.to(memory_format=channels_last)
    if order == "strides of a view":  # (N, spatial, C), permuted
        rest = shape[2:]
        x = torch.randn(shape[0], *rest, shape[1]).movedim(-1, 1)
        x = x.squeeze(rest.index(1) + 2).unsqueeze(rest.index(1) + 2) if 1 in rest else x
    features = x.shape[-1] if name in ("layer_norm", "rms_norm") else x.shape[1]
    weight, bias = torch.ones(features), torch.ones(features)
    groups = {"group_norm": lambda f, x, w, b: f.group_norm(x, 1, w, b)}
    call = groups.get(name, CALLS[name])
    for training in (True, False) if name == "batch_norm" else (True,):
        if not training:
            zero, one = torch.zeros(features), torch.ones(features)
            call = lambda f, x, w, b: f.batch_norm(x, zero, one, w, b)  # noqa: B023, E731
        y, expected = (call(f, x, weight, bias) for f in (fastbn.torch, theirs))
        assert y.stride() == expected.stride(), x.stride()


def test_the_imaginary_part_of_a_conjugate():
    x = torch.randn(4, 6, 5, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    y = fastbn.torch.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(y, theirs.batch_norm(x.resolve_neg(), None, None, training=True))


@pytest.mark.usefixtures("no_way_back")
def test_running_statistics():
    x = torch.randn(4, 6, 5)
    for name, arguments in ("batch_norm", (None, None, True)), ("instance_norm", (None, None)):
        found = []
        for f in fastbn.torch, theirs:
            running = torch.zeros(6), torch.ones(6)
            y = getattr(f, name)(x, *running, *arguments, momentum=0.3)
            fixed = getattr(f, name)(x, *running, None, None, False)
            found.append([y, fixed, *running])
        assert_same(*found, torch.float32)
        assert found[0][2].abs().max() > 0


# ---- which way a call goes ------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_what_it_is_in_a_batch(name):
    """Small calls have the kernels' bits, and their accuracy at a large mean."""
    x, weight, bias = (t.detach() for t in tensors(shape=(1, 6, 1, 6)))
    x = x + 3e4
    if name == "batch_norm":
        call = lambda x: fastbn.torch.batch_norm(x, bias, weight.abs(), weight, bias)  # noqa: E731
    else:
        call = lambda x: CALLS[name](fastbn.torch, x, weight, bias)  # noqa: E731
    y = call(x.requires_grad_())
    assert nodes(y)[0] == "NormaliseBackward"
    assert torch.equal(call(x.repeat(64, 1, 1, 1))[:1], y)
    exact = CALLS[name](theirs, x.double(), weight.double(), bias.double())
    if name != "batch_norm":
        torch.testing.assert_close(y, exact.float(), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [1, 64])
def test_running_statistics_have_no_gradients(size, training):
    x, mean, var = torch.randn(size, 8, 8, 8), torch.zeros(8, requires_grad=True), torch.ones(8)
    errors = []
    for f in fastbn.torch, theirs:
        with pytest.raises(RuntimeError) as caught:
            f.batch_norm(x, mean, var, training=training)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
    with torch.no_grad():
        fastbn.torch.batch_norm(x, mean, var, training=training)


@pytest.mark.parametrize("norm", ["batch_norm", "layer_norm", "group_norm"])
@pytest.mark.parametrize("kinds", [(0, 1), (1, 0), (0, 2), (2, 0), (2, 3)], ids=str)
def test_dtypes_that_differ_are_refused(norm, kinds):
    of_x, of_vectors = (DTYPES[kind] for kind in kinds)
    x = torch.randn(8, 6, 5 if norm != "layer_norm" else 6, dtype=of_x)
    weight, bias = torch.ones(6, dtype=of_vectors), torch.zeros(6, dtype=of_vectors)
    found = []
    for f in fastbn.torch, theirs:
        try:
            found.append(CALLS[norm](f, x, weight, bias).dtype)
        except RuntimeError as error:
            found.append(str(error))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", NAMES)
def test_transformations(name):
    x, weight, bias = tensors(torch.float64)

    def calls(f):
        return lambda x: CALLS[name](f, x, weight, bias)

    for transformed in [
        lambda call: torch.func.vmap(call)(torch.stack([x, 2 * x])),
        lambda call: torch.func.jvp(call, (x,), (torch.ones_like(x),)),
        lambda call: torch.func.grad(lambda x: call(x).pow(3).sum())(x),
        lambda call: torch.func.vmap(torch.func.grad(lambda x: call(x).pow(3).sum()))(
            torch.stack([x, 2 * x])
        ),
    ]:
        torch.testing.assert_close(transformed(calls(fastbn.torch)), transformed(calls(theirs)))


def test_running_statistics_are_not_mapped_over():
    # As in PyTorch: they would have to be written by every sample at once.
    x, running = torch.randn(3, 4, 6, 5), [torch.zeros(6), torch.ones(6)]
    for f in fastbn.torch, theirs:
        with pytest.raises(RuntimeError, match=r"vmap|in-place|running"):
            torch.func.vmap(lambda x: f.batch_norm(x, *running, training=True))(x)  # noqa: B023


def test_another_device_and_another_kind_of_tensor():
    x = torch.randn(4, 6, 5, device="meta")
    assert fastbn.torch.batch_norm(x, None, None, training=True).is_meta

    class Seen(torch.Tensor):
        calls = ()

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.calls += (func.__name__,)
            return super().__torch_function__(func, types, args, kwargs or {})

    # It sees what it sees of PyTorch's own functions, wherever it stands.
    tensors_of = {"x": torch.randn(4, 6, 6), "w": torch.ones(6), "b": torch.ones(6)}
    for name, call in CALLS.items():
        for kind in tensors_of:
            if name == "rms_norm" and kind == "b":
                continue
            given = {k: v.as_subclass(Seen) if k == kind else v for k, v in tensors_of.items()}
            Seen.calls = ()
            expected = call(theirs, **given)
            calls, Seen.calls = Seen.calls, ()
            y = call(fastbn.torch, **given)
            assert type(y) is Seen
            assert [c for c in Seen.calls if c != "numel"] == list(calls)
            torch.testing.assert_close(
                y.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor)
            )


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name):
    for dtype in torch.float32, torch.bfloat16:
        x, weight, bias = tensors(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            y, expected = (CALLS[name](f, x, weight, bias) for f in (fastbn.torch, theirs))
        assert y.dtype == expected.dtype == dtype


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_counts_once(reentrant):
    found = []
    for checkpoints in True, False:
        norm = fastbn.torch.BatchNorm1d(6)
        x = torch.linspace(0, 1, 120).view(20, 6).requires_grad_()
        layers = torch.nn.Sequential(norm, torch.nn.Sigmoid())
        y = checkpoint(layers, x, use_reentrant=reentrant) if checkpoints else layers(x)
        y.square().sum().backward()
        found.append([x.grad, norm.weight.grad, norm.running_mean, norm.running_var])
        assert norm.num_batches_tracked == 1
    for mine, expected in zip(*found, strict=True):
        assert torch.equal(mine, expected)


def test_threads_follow_pytorch():
    before = torch.get_num_threads()
    seen = []
    x = torch.randn(4, 6, 5)

    def look():
        fastbn.torch.batch_norm(x, None, None, training=True)
        seen.append(fastbn.get_num_threads())

    try:
        for count in 1, 2:
            torch.set_num_threads(count)
            look()
            # A new thread has OpenMP's number, until PyTorch tells it the other.
            thread = threading.Thread(target=look)
            thread.start()
            thread.join()
            most = min(count, fastbn.get_num_threads())
            assert seen[-2:] == [most, most]
    finally:
        torch.set_num_threads(before)
    assert seen[0] == 1

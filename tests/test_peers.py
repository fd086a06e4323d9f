# SPDX-License-Identifier: BSD-3-Clause
"""PyTorch's own results, on its own shapes, where PyTorch is installed.

With FASTBN_REQUIRE_PEERS=1 a missing peer is a failure, not a skip.
"""

import itertools
import os

import bounds
import numpy as np
import oracle
import pytest
from arrays import assert_near, batch, half_ulp
from cases import ACTIVATIONS, Case, Expected

import fastbn

if os.environ.get("FASTBN_REQUIRE_PEERS") == "1":
    import torch
else:
    torch = pytest.importorskip("torch")

# From the test suites of torch.nn.BatchNorm1d, 2d, 3d, and beyond.
SHAPES = [(4, 10), (4, 10, 3), (2, 3, 6, 6), (2, 3, 4, 4, 4), (5, 5, 5, 5, 5), (16, 128), (2, 1)]
# How many roundings to their dtype PyTorch may have where ours are counted: of each number that
# meets in a result, of x and its mean, too, which it subtracts from one another at the end.
THEIRS = 4


def rooms_of(expected, theirs=False):
    """Of y and the gradients, for the statistics that forward finds; of ours and theirs."""
    rooms = [expected.room_y, *expected.rooms_of(expected.dz, exact=expected.frozen is not None)]
    if theirs:
        unit = THEIRS * half_ulp(1.0, expected.x.dtype.name)
        of = expected.bounds(exact=False)
        of.off = of.off + unit * (of.xhat + 2 * of.far)
        of_z = of.of_z(expected.z, expected.adds) + unit * np.abs(expected.z)
        options = expected.x.dtype, *expected.activation
        of_dz = bounds.of_dz(expected.z, of_z, expected.dy, *options)
        of_dz = of_dz + unit * np.abs(expected.dz)
        more = [
            bounds.of_y(expected.z, of_z, *options) + unit * np.abs(expected.y),
            *of.of_gradients(expected.dz, of_dz, expected.frozen is not None), of_dz,
        ]  # fmt: skip
        rooms = [room + other for room, other in zip(rooms, more[: len(rooms)], strict=True)]
    if not expected.case.has_mean:
        del rooms[3]
    return rooms


def assert_agree(expected, found, others, theirs=False):
    """y and gradients: ours, and PyTorch's in float64 or, if they are `theirs`, in x's dtype."""
    rooms = rooms_of(expected, theirs)
    for mine, other, room in zip(found, others, rooms[: len(found)], strict=True):
        if other is not None:
            assert mine.shape == other.shape
            assert_near(mine, other.astype(np.float64), room)


def gradients_of(tensors):
    return [None if t is None else to_numpy(t.grad) for t in tensors]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, 0.75])
def test_functional(level, dtype, shape, affine, training, momentum):
    rng = np.random.default_rng(5)
    channels = shape[1]
    x, dy = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    weight, bias = (rng.standard_normal(channels).astype(dtype) for _ in range(2))
    if not affine:
        weight = bias = None
    running = [rng.standard_normal(channels).astype(dtype), rng.random(channels).astype(dtype)]
    theirs = [torch.tensor(a) for a in running]
    tensors = [
        None if a is None else torch.tensor(a, requires_grad=True) for a in (x, weight, bias)
    ]
    expected = torch.nn.functional.batch_norm(
        tensors[0], *theirs, tensors[1], tensors[2], training, momentum, 1e-5
    )
    expected.backward(torch.tensor(dy))

    before = [a.copy() for a in running]
    y = fastbn.batch_norm(x, *running, weight, bias, training, momentum, 1e-5)
    exact = Expected(Case("batch", shape), x, dy, weight, bias, frozen=None if training else before)
    _, mean, invstd = fastbn.batch_norm_forward(
        x, weight, bias, running_mean=before[0].copy(), running_var=before[1].copy(),
        training=training,
    )  # fmt: skip
    found = fastbn.batch_norm_backward(dy, x, mean, invstd, weight, training=training)
    others = [expected.detach().numpy(), *gradients_of(tensors)]
    assert_agree(exact, [y, *found], others, theirs=True)
    if not training:
        for mine, other, old in zip(running, theirs, before, strict=True):
            assert mine.tobytes() == other.numpy().tobytes() == old.tobytes()
        return
    n = x.size // channels
    updates = (exact.mean, bounds.of_mean(exact.mean, exact.var, dtype)), (
        exact.var * n / (n - 1), bounds.of_variance(dtype) * exact.var * n / (n - 1)
    )  # fmt: skip
    for mine, other, old, (new, room) in zip(running, theirs, before, updates, strict=True):
        room = bounds.of_running(old, new, room, momentum)
        room = room + bounds.roundings(1, dtype) * (np.abs(old) + np.abs(new))
        assert_near(mine, other.numpy().astype(float), THEIRS * room)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_layer_over_several_batches(momentum, track, affine):
    theirs = torch.nn.BatchNorm2d(3, 1e-3, momentum, affine, track)
    mine = fastbn.BatchNorm(3, 1e-3, momentum, affine, track)
    if affine:
        torch.nn.init.normal_(theirs.weight)
    mine.load_state_dict({k: v.numpy() for k, v in theirs.state_dict().items()})
    rng = np.random.default_rng(6)
    for _ in range(5):
        x, dy = (rng.standard_normal((4, 3, 5, 5)).astype(np.float32) for _ in range(2))
        tensor = torch.tensor(x, requires_grad=True)
        theirs.zero_grad()
        expected = theirs(tensor)
        expected.backward(torch.tensor(dy))
        exact = Expected(Case("batch", x.shape), x, dy, mine.weight, mine.bias, eps=1e-3)
        found = [mine(x), mine.backward(dy)]
        found += [mine.weight_grad, mine.bias_grad] if affine else []
        tensors = [tensor, theirs.weight, theirs.bias] if affine else [tensor]
        near = [expected.detach().numpy(), *gradients_of(tensors)]
        assert_agree(exact, found, near, theirs=True)
    state = theirs.state_dict()
    assert list(state) == list(mine.state_dict())
    for name, value in mine.state_dict().items():
        np.testing.assert_allclose(value, state[name].numpy(), atol=1e-5)
        assert value.dtype == state[name].numpy().dtype
        assert value.shape == tuple(state[name].shape)
    x = rng.standard_normal((4, 3, 5, 5)).astype(np.float32)
    expected = theirs.eval()(torch.tensor(x)).detach().numpy()
    mine.eval()
    frozen = (mine.running_mean, mine.running_var) if track else None
    exact = Expected(Case("batch", x.shape), x, x, mine.weight, mine.bias, 1e-3, frozen)
    # Of running statistics, too, which have been rounded five times.
    room = 0 if frozen is None else 5 * bounds.roundings(8, "float32") * (1 + np.abs(exact.z))
    assert_near(mine(x), expected, rooms_of(exact, theirs=True)[0] + room)


def test_channels_last_memory():
    x = torch.randn(4, 6, 9, 8).to(memory_format=torch.channels_last)
    expected = torch.nn.functional.batch_norm(x, None, None, training=True)
    y = fastbn.batch_norm(x.numpy(), None, None, training=True)
    assert y.strides == tuple(4 * s for s in expected.stride())
    exact = Expected(Case("batch", y.shape), x.numpy(), x.numpy())
    assert_agree(exact, [y], [expected.numpy()], theirs=True)


def test_a_tensor_is_refused_by_name():
    tensor = torch.zeros(2, 3)
    x = np.zeros((2, 3), np.float32)
    with pytest.raises(TypeError, match=r"x: .*torch.*x\.detach\(\)\.numpy\(\)"):
        fastbn.batch_norm(tensor, None, None, training=True)
    for name in ("running_mean", "running_var"):
        with pytest.raises(TypeError, match=rf"{name}: .*\.numpy\(\)"):
            fastbn.batch_norm_forward(x, **{name: torch.zeros(3)})


def test_gradients_agree_with_double_precision_autograd(level):
    for shape, training in itertools.product([(20, 7), (3, 4, 9, 11)], [True, False]):
        rng = np.random.default_rng(7)
        x, dy = (rng.standard_normal(shape).astype(np.float32) + mean for mean in (100, 1))
        weight = rng.standard_normal(shape[1])
        fixed = rng.random(shape[1]) + 99, rng.random(shape[1]) + 0.5
        exact = Expected(Case("batch", shape), x, dy, weight, frozen=None if training else fixed)
        tensors = [torch.tensor(a.astype(np.float64), requires_grad=True) for a in (x, weight)]
        other = torch.nn.functional.batch_norm(
            tensors[0], *[torch.tensor(f.copy()) for f in fixed], tensors[1], training=training
        )
        other.backward(torch.tensor(dy.astype(np.float64)))
        y, mean, invstd = fastbn.batch_norm_forward(
            x, weight, running_mean=fixed[0], running_var=fixed[1], training=training
        )
        found = fastbn.batch_norm_backward(dy, x, mean, invstd, weight, training=training)
        others = [other.detach().numpy(), *gradients_of(tensors), None]
        assert_agree(exact, [y, *found], others)


# ---- the siblings -------------------------------------------------------------------

SIBLINGS = [
    Case("layer", (4, 10), 10),
    Case("layer", (20, 5, 10), 10),
    Case("layer", (5, 4, 10, 10), (4, 10, 10)),
    Case("layer", (3, 2, 7, 5), (7, 5)),
    Case("layer", (64, 768), 768),
    Case("rms", (4, 10), 10),
    Case("rms", (3, 2, 7, 5), (7, 5)),
    Case("rms", (64, 768), 768),
    Case("group", (4, 6, 5), 3),
    Case("group", (4, 6, 5, 5), 1),
    Case("group", (4, 6, 5, 5), 6),
    Case("group", (4, 12), 3),
    Case("group", (2, 32, 14, 14), 8),
    Case("instance", (4, 3, 15)),
    Case("instance", (2, 3, 6, 6)),
    Case("instance", (2, 3, 4, 4, 4)),
    Case("instance", (2, 32, 14, 14)),
]


def theirs(case, x, weight, bias, eps=1e-5):
    functional = torch.nn.functional
    if case.op == "layer":
        return functional.layer_norm(x, case.parameter_shape, weight, bias, eps)
    if case.op == "rms":
        return functional.rms_norm(x, case.parameter_shape, weight, eps)
    if case.op == "group":
        return functional.group_norm(x, case.what, weight, bias, eps)
    return functional.instance_norm(x, weight=weight, bias=bias, eps=eps)


def double_precision(case, x, dy, weight, bias, eps=1e-5):
    """y and the gradients of PyTorch's autograd in float64, of the numbers as they are."""
    tensors = [
        None if a is None else torch.tensor(a.astype(np.float64), requires_grad=True)
        for a in (x, weight, bias)
    ]
    y = theirs(case, *tensors, eps)
    y.backward(torch.tensor(dy.astype(np.float64)))
    gradients = [None if t is None or t.grad is None else t.grad.numpy() for t in tensors]
    return y.detach().numpy(), gradients


def to_torch(array):
    """A tensor of the same numbers; NumPy's bfloat16 by its patterns."""
    if array is None or array.dtype != "bfloat16":
        return None if array is None else torch.tensor(array)
    return torch.tensor(array.view(np.uint16)).view(torch.bfloat16)


def to_numpy(tensor):
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view("bfloat16")
    return tensor.numpy()


@pytest.mark.parametrize("case", SIBLINGS, ids=str)
def test_the_oracle_itself(case):
    x, dy = case.batch("float64"), case.gradient("float64")
    weight, bias = case.parameters("float64")
    bias = bias if case.has_mean else None
    y, gradients = double_precision(case, x, dy, weight, bias)
    # Both in float64, so nearer than the bound of ours.
    mean, var = oracle.moments(case.op, x, case.what)
    mine = oracle.forward(case.op, x, mean, var, weight, bias, what=case.what)
    np.testing.assert_allclose(mine, y, atol=1e-13)
    mine = oracle.gradients(case.op, dy, x, mean, 1 / np.sqrt(var + 1e-5), weight, what=case.what)
    for k, other in enumerate(gradients):
        if other is not None:
            np.testing.assert_allclose(mine[k], other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("case", SIBLINGS, ids=str)
def test_siblings_agree_with_double_precision_autograd(level, any_dtype, case, affine):
    x, dy = case.batch(any_dtype), case.gradient(any_dtype)
    weight, bias = case.parameters("float64") if affine else (None, None)
    bias = bias if case.has_mean else None
    exact, gradients = double_precision(case, x, dy, weight, bias)
    y, saved = case.forward(x, weight, bias, eps=1e-5)
    found = case.backward(dy, x, saved, weight)
    expected = Expected(case, x, dy, weight, bias)
    assert_agree(expected, [y, *found], [exact, *gradients[: len(found)]])


@pytest.mark.parametrize("case", SIBLINGS, ids=str)
def test_siblings_agree_with_the_same_dtype(level, any_dtype, case):
    x, dy = case.batch(any_dtype), case.gradient(any_dtype)
    weight, bias = case.parameters(any_dtype)
    bias = bias if case.has_mean else None
    tensors = [to_torch(a) for a in (x, weight, bias)]
    for tensor in tensors:
        if tensor is not None:
            tensor.requires_grad = True
    other = theirs(case, *tensors)
    other.backward(to_torch(dy))
    y, saved = case.forward(x, weight, bias, eps=1e-5)
    found = case.backward(dy, x, saved, weight)
    near = [to_numpy(other), *gradients_of(tensors[: len(found)])]
    expected = Expected(case, x, dy, weight, bias)
    assert [a.dtype for a in (y, *found)] == [a.dtype for a in near]
    assert_agree(expected, [y, *found], near, theirs=True)


@pytest.mark.parametrize("shape", [(4, 3, 15), (2, 3, 6, 6)])
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, 0.75])
def test_running_statistics_of_instances(level, dtype, shape, momentum):
    rng = np.random.default_rng(8)
    x = batch(shape, dtype)
    running = [rng.standard_normal(3).astype(dtype), rng.random(3).astype(dtype) + 1]
    before = [a.copy() for a in running]
    others = [torch.tensor(a) for a in running]
    expected = torch.nn.functional.instance_norm(torch.tensor(x), *others, momentum=momentum)
    y = fastbn.instance_norm(x, *running, momentum=momentum)
    exact = Expected(Case("instance", shape), x, x)
    assert_agree(exact, [y], [expected.numpy()], theirs=True)
    n = exact.case.values
    updates = (exact.mean, bounds.of_mean(exact.mean, exact.var, dtype)), (
        exact.var * n / (n - 1), bounds.of_variance(dtype) * exact.var * n / (n - 1)
    )  # fmt: skip
    for mine, other, old, (new, room) in zip(running, others, before, updates, strict=True):
        room = bounds.of_running(old, new.mean(0), room.mean(0), momentum)
        room = room + bounds.roundings(1, dtype) * (np.abs(old) + np.abs(new.mean(0)))
        assert_near(mine, other.numpy().astype(float), THEIRS * room)
    others = [torch.tensor(a) for a in running]
    expected = torch.nn.functional.instance_norm(torch.tensor(x), *others, use_input_stats=False)
    y = fastbn.instance_norm(x, *running, use_input_stats=False)
    exact = Expected(Case("batch", shape), x, x, frozen=running)
    assert_agree(exact, [y], [expected.numpy()], theirs=True)


def test_infinities_and_nans_as_theirs(level):
    for bad in (np.inf, -np.inf, np.nan):
        for case in (Case("layer", (3, 20), 20), Case("rms", (3, 20), 20),
                     Case("group", (3, 6, 5), 2), Case("instance", (3, 4, 5))):  # fmt: skip
            x = case.batch("float32")
            x[1, 3] = bad
            expected = theirs(case, torch.tensor(x), None, None).numpy()
            y = case.forward(x, eps=1e-5)[0]
            assert np.isnan(expected).any()
            np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
            there = ~np.isnan(expected)
            x[1] = 0  # where the bad one was: alone in its groups
            exact = Expected(case, x, x)
            y[1], expected[1], there[1] = 0, 0, False
            room = rooms_of(exact, theirs=True)[0]
            assert_near(y[there], expected[there], room[there])


SIBLING_LAYERS = [
    (lambda: torch.nn.LayerNorm((6, 5)), lambda: fastbn.LayerNorm((6, 5)),
     lambda shape: Case("layer", shape, (6, 5)), 1e-5),
    (lambda: torch.nn.LayerNorm(5, 1e-3), lambda: fastbn.LayerNorm(5, 1e-3),
     lambda shape: Case("layer", shape, 5), 1e-3),
    (lambda: torch.nn.LayerNorm(5, bias=False), lambda: fastbn.LayerNorm(5, bias=False),
     lambda shape: Case("layer", shape, 5), 1e-5),
    (lambda: torch.nn.LayerNorm(5, elementwise_affine=False),
     lambda: fastbn.LayerNorm(5, elementwise_affine=False),
     lambda shape: Case("layer", shape, 5), 1e-5),
    (lambda: torch.nn.RMSNorm(5), lambda: fastbn.RMSNorm(5),
     lambda shape: Case("rms", shape, 5), 2.0**-23),
    (lambda: torch.nn.RMSNorm([6, 5], 1e-3), lambda: fastbn.RMSNorm([6, 5], 1e-3),
     lambda shape: Case("rms", shape, (6, 5)), 1e-3),
    (lambda: torch.nn.RMSNorm(5, elementwise_affine=False),
     lambda: fastbn.RMSNorm(5, elementwise_affine=False),
     lambda shape: Case("rms", shape, 5), 2.0**-23),
    (lambda: torch.nn.GroupNorm(2, 4), lambda: fastbn.GroupNorm(2, 4),
     lambda shape: Case("group", shape, 2), 1e-5),
    (lambda: torch.nn.GroupNorm(4, 4, 1e-3), lambda: fastbn.GroupNorm(4, 4, 1e-3),
     lambda shape: Case("group", shape, 4), 1e-3),
    (lambda: torch.nn.GroupNorm(1, 4, affine=False), lambda: fastbn.GroupNorm(1, 4, affine=False),
     lambda shape: Case("group", shape, 1), 1e-5),
    (lambda: torch.nn.InstanceNorm2d(4), lambda: fastbn.InstanceNorm(4),
     lambda shape: Case("instance", shape), 1e-5),
    (lambda: torch.nn.InstanceNorm2d(4, 1e-3, 0.3, True, True),
     lambda: fastbn.InstanceNorm(4, 1e-3, 0.3, True, True),
     lambda shape: Case("instance", shape), 1e-3),
]  # fmt: skip


@pytest.mark.parametrize(("make_theirs", "make_mine", "make_case", "eps"), SIBLING_LAYERS)
def test_sibling_layers_over_several_batches(make_theirs, make_mine, make_case, eps):
    theirs, mine = make_theirs(), make_mine()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    mine.load_state_dict({k: v.numpy() for k, v in theirs.state_dict().items()})
    rng = np.random.default_rng(9)
    for _ in range(3):
        x, dy = (rng.standard_normal((3, 4, 6, 5)).astype(np.float32) for _ in range(2))
        tensor = torch.tensor(x, requires_grad=True)
        theirs.zero_grad()
        expected = theirs(tensor)
        expected.backward(torch.tensor(dy))
        bias = getattr(mine, "bias", None)  # rms norm has none
        exact = Expected(make_case(x.shape), x, dy, mine.weight, bias, eps=eps)
        found = [mine(x), mine.backward(dy)]
        near = [expected.detach().numpy(), tensor.grad.numpy()]
        for name, parameter in theirs.named_parameters():
            assert name == ("weight", "bias")[len(found) - 2]
            found.append(getattr(mine, f"{name}_grad"))
            near.append(parameter.grad.numpy())
        assert_agree(exact, found, near, theirs=True)
    state = mine.state_dict()
    assert list(state) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert state[name].dtype == value.numpy().dtype
        assert state[name].shape == tuple(value.shape)
        if name != "num_batches_tracked":  # PyTorch's instance norm never counts
            # Of three batches; parameters are as they were.
            room = 3 * bounds.roundings(12, "float32") * np.abs(state[name])
            room = room + 3 * bounds.roundings(12, "float32") * name.startswith("running")
            assert_near(state[name], value.numpy().astype(float), room)
    # And back.
    back = make_theirs()
    back.load_state_dict({k: torch.tensor(v) for k, v in state.items()})
    x = rng.standard_normal((3, 4, 6, 5)).astype(np.float32)
    expected = back.eval()(torch.tensor(x)).detach().numpy()
    case, frozen = make_case(x.shape), None
    if "running_mean" in state:
        case, frozen = Case("batch", x.shape), (state["running_mean"], state["running_var"])
    exact = Expected(case, x, x, mine.weight, getattr(mine, "bias", None), eps, frozen)
    assert_agree(exact, [mine.eval()(x)], [expected], theirs=True)


def test_channels_last_memory_of_siblings():
    shape = 4, 6, 9, 8
    x = torch.randn(shape).to(memory_format=torch.channels_last)
    for case in (Case("group", shape, 2), Case("instance", shape),
                 Case("layer", shape, (6, 9, 8)), Case("layer", shape, 8)):  # fmt: skip
        expected = theirs(case, x, None, None)
        y = case.forward(x.numpy())[0]
        exact = Expected(case, x.numpy(), x.numpy())
        assert_agree(exact, [y], [expected.numpy()], theirs=True)


def test_tensors_are_refused_by_name():
    tensor = torch.zeros(2, 4)
    x = np.zeros((2, 4), np.float32)
    for call in (
        lambda: fastbn.layer_norm(tensor, 4),
        lambda: fastbn.rms_norm(tensor, 4),
        lambda: fastbn.group_norm(tensor, 2),
        lambda: fastbn.instance_norm(tensor),
    ):
        with pytest.raises(TypeError, match=r"x: .*torch.*x\.detach\(\)\.numpy\(\)"):
            call()
    with pytest.raises(TypeError, match=r"weight: .*\.numpy\(\)"):
        fastbn.layer_norm(x, 4, torch.zeros(4))


def test_batches_of_half_types_agree(level, half):
    case = Case("batch", (8, 6, 9, 5))
    x, dy = case.batch(half), case.gradient(half)
    weight, bias = case.parameters("float32")
    tensors = [to_torch(a) for a in (x, weight, bias)]
    double = [t.double().requires_grad_() for t in tensors]
    other = torch.nn.functional.batch_norm(double[0], None, None, *double[1:], training=True)
    other.backward(to_torch(dy).double())
    y, mean, invstd = fastbn.batch_norm_forward(x, weight, bias)
    found = fastbn.batch_norm_backward(dy, x, mean, invstd, weight)
    expected = Expected(case, x, dy, weight, bias)
    assert_agree(expected, [y, *found], [other.detach().numpy(), *gradients_of(double)])


@pytest.mark.parametrize("transposed", [False, True])
def test_folding(transposed):
    rng = np.random.default_rng(12)
    kernel = rng.standard_normal((5, 5, 3, 3))
    vectors = [rng.uniform(0.5, 1.5, 5) for _ in range(5)]
    kernel_bias, mean, var, weight, bias = vectors
    theirs = torch.nn.utils.fusion.fuse_conv_bn_weights(
        *map(torch.tensor, (kernel, kernel_bias, mean, var)), 1e-5,
        torch.tensor(weight), torch.tensor(bias), transpose=transposed,
    )  # fmt: skip
    mine = fastbn.fold_batch_norm(
        kernel, kernel_bias, mean, var, weight, bias,
        kernel_layout="IOHW" if transposed else "OIHW",
    )  # fmt: skip
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(a, b.numpy(), atol=1e-13)


# ---- followed by an activation, preceded by an addition ---------------------------------

FUSED = [
    Case("batch", (4, 10)),
    Case("batch", (4, 6, 9, 5)),
    Case("batch", (8, 16, 7, 7)),
    Case("batch", (2, 5, 33, 32)),
    Case("layer", (20, 5, 10), 10),
    Case("layer", (3, 2, 7, 5), (7, 5)),
    Case("layer", (64, 768), 768),
    Case("rms", (3, 2, 7, 5), (7, 5)),
    Case("rms", (64, 768), 768),
    Case("group", (4, 6, 5, 5), 1),
    Case("group", (2, 32, 14, 14), 8),
    Case("instance", (2, 32, 14, 14)),
    Case("instance", (4, 3, 15)),
]


def their_activation(name):
    """PyTorch's, but where its gradient has a sixth in float32 for float64, too."""
    if name == "hardsigmoid":
        return lambda z: torch.nn.functional.relu6(z + 3) / 6
    return getattr(torch.nn.functional, name)


def fused_by_torch(case, x, weight, bias, residual, activation):
    functional = torch.nn.functional
    if case.op == "batch":
        z = functional.batch_norm(x, None, None, weight, bias, training=True)
    else:
        z = theirs(case, x, weight, bias)
    if residual is not None:
        z = z + residual
    if activation == "leaky_relu":
        return functional.leaky_relu(z, 0.2)
    return their_activation(activation)(z)


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", FUSED, ids=str)
def test_fused_calls_agree_with_autograd(dtype, case, activation, adds):
    weight, bias = case.parameters(dtype)
    arrays = {"x": case.batch(dtype), "weight": weight, "bias": bias if case.has_mean else None,
              "residual": case.batch(dtype, 6) if adds else None}  # fmt: skip
    dy = case.gradient(dtype)
    options = {"activation": activation, "negative_slope": 0.2, "residual": arrays["residual"]}
    expected = Expected(case, arrays["x"], dy, weight, bias, **options)
    y, saved = case.forward(arrays["x"], weight, bias, eps=1e-5, **options)
    if case.has_mean:
        options["bias"] = bias
    mine = case.backward(dy, arrays["x"], saved, weight, **options)
    # What both compute in float64, and what they compute in the dtype.
    for kind in ("float64", dtype):
        tensors = [
            None if a is None else torch.tensor(a.astype(kind), requires_grad=True)
            for a in arrays.values()
        ]
        other = fused_by_torch(case, *tensors, activation)
        other.backward(torch.tensor(dy.astype(kind)))
        exact = gradients_of(tensor for tensor in tensors if tensor is not None)
        assert_agree(expected, [y, *mine], [other.detach().numpy(), *exact], kind != "float64")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fused_inference_and_frozen_gradients_agree(level, dtype, activation):
    case = Case("batch", (4, 6, 9, 5))
    x, dy, residual = case.batch(dtype), case.gradient(dtype), case.batch(dtype, 6)
    weight, bias = case.parameters(dtype)
    mean, var = case.parameters(dtype, 4)
    var += 2
    tensors = [torch.tensor(a, requires_grad=True) for a in (x, weight, bias, residual)]
    z = torch.nn.functional.batch_norm(
        tensors[0], torch.tensor(mean), torch.tensor(var), *tensors[1:3]
    )
    function = their_activation(activation)
    other = function(z + tensors[3])
    other.backward(torch.tensor(dy))
    options = {"activation": activation, "residual": residual}  # both slopes are 0.01
    y, *saved = fastbn.batch_norm_forward(
        x, weight, bias, running_mean=mean, running_var=var, training=False, **options
    )
    mine = case.backward(dy, x, saved, weight, bias=bias, training=False, **options)
    expected = Expected(case, x, dy, weight, bias, frozen=(mean, var), **options)
    others = [other.detach().numpy(), *gradients_of(tensors)]
    assert_agree(expected, [y, *mine], others, theirs=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fused_values_far_out_as_theirs(level, dtype, activation):
    # NaN, infinities, zeros of either sign, numbers whose square or exponential overflows.
    z = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e30, -1e30, 90.0, -90.0, -200.0], dtype)
    zeros, ones = np.zeros(z.size, dtype), np.ones(z.size, dtype)
    y = fastbn.batch_norm(z[None], zeros, ones, eps=0, activation=activation)[0]
    function = their_activation(activation)
    expected = function(torch.tensor(z)).numpy()
    if np.isnan(expected[2]):
        # -Inf / (1 + Inf) and the like; here the limit.
        expected[2] = oracle.activated(-np.inf, activation)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-37)
    tensor = torch.tensor(z[3:], requires_grad=True)
    function(tensor).sum().backward()
    dx = fastbn.batch_norm_backward(
        ones[None, 3:], z[None, 3:], zeros[3:], ones[3:], training=False, activation=activation
    )[0][0]
    np.testing.assert_allclose(dx, tensor.grad.numpy(), rtol=1e-4, atol=1e-37)

# SPDX-License-Identifier: BSD-3-Clause
"""Models of torchvision and timm: what `fastbn.torch` makes of them, beside PyTorch.

    python -m benchmarks.torch_models                   # all, five minutes
    python -m benchmarks.torch_models resnet vit        # those with one of these in the name
    python -m benchmarks.torch_models --compile         # and torch.compile of the fused model

Each model, with random weights, does one forward pass in evaluation mode and one step of SGD in
training mode: as it is, with ``fastbn.torch.enable()``, and after ``fuse(convert(model))``.
Printed is the largest difference from PyTorch's results, in parts of the largest of them: of the
output, and of the gradients of the parameters; beside it, that of PyTorch's own channels_last
from its contiguous results, which says how much the model makes of a rounding. Then the norms that
fastbn
computed in the fused model, those that PyTorch did, and how many had what follows in the same pass.

Needs ``python -m pip install torchvision timm`` in the versions that fit the installed PyTorch.
"""

import argparse
import copy
import importlib
import logging
import sys
import warnings

import torch

import fastbn.torch

TORCHVISION = {
    "resnet18": 64, "resnext50_32x4d": 64, "wide_resnet50_2": 64, "mobilenet_v2": 64,
    "mobilenet_v3_small": 64, "efficientnet_b0": 64, "efficientnet_v2_s": 64, "densenet121": 64,
    "shufflenet_v2_x1_0": 64, "regnet_y_400mf": 64, "mnasnet1_0": 64, "vgg11_bn": 64,
    "googlenet": 64, "inception_v3": 299, "convnext_tiny": 64, "swin_t": 64, "swin_v2_t": 64,
    "vit_b_32": 224, "maxvit_t": 224,
    "segmentation.fcn_resnet50": 64, "segmentation.deeplabv3_mobilenet_v3_large": 64,
    "segmentation.lraspp_mobilenet_v3_large": 64,
}  # fmt: skip
TIMM = {
    "resnet18": 64, "resnet26d": 64, "convnext_atto": 64, "efficientnet_lite0": 64,
    "mobilenetv3_small_050": 64, "regnetx_002": 64, "densenet121": 64, "ghostnet_050": 64,
    "vit_tiny_patch16_224": 224, "mixer_s32_224": 224, "poolformer_s12": 64, "levit_128s": 224,
    "repvgg_a0": 64, "hrnet_w18_small": 64, "resnetv2_50": 64, "dla34": 64,
    "xcit_nano_12_p16_224": 224,
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="only models with one of these in the name")
    parser.add_argument("--compile", action="store_true", help="compile the fused model, too")
    parser.add_argument("--why", action="store_true", help="print the warnings")
    arguments = parser.parse_args()
    libraries = [library_of("torchvision", TORCHVISION), library_of("timm", TIMM)]
    print(
        "model | output: enabled, fused, PyTorch's formats | gradients: the same |"
        " norms of fastbn, of PyTorch, fused"
    )
    print("--- | --- | --- | ---")
    for library, models in libraries:
        for name, size in models.items():
            label = f"{library} {name}"
            if not arguments.names or any(part in label for part in arguments.names):
                print(row(label, made(library, name), size, arguments), flush=True)


def library_of(name, models):
    try:
        importlib.import_module(name)
    except ImportError as error:
        sys.exit(
            f"{name} is needed ({error}): python -m pip install torchvision timm; for PyTorch"
            f" {torch.__version__}, torchvision's release notes say which version fits"
        )
    return name, models


def made(library, name):
    torch.manual_seed(0)
    if library == "timm":
        import timm

        return timm.create_model(name, num_classes=10)
    from torchvision import models

    home, _, name = name.rpartition(".")
    return getattr(getattr(models, home) if home else models, name)(
        weights=None, num_classes=10, **({"weights_backbone": None} if home else {})
    )


def row(label, model, size, arguments):
    x = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        last = torch.channels_last
        plain = results(copy.deepcopy(model), x)
        formats = results(copy.deepcopy(model).to(memory_format=last), x.to(memory_format=last))
        enabled = None
        if hasattr(fastbn.torch, "enabled"):
            with fastbn.torch.enabled():
                enabled = results(copy.deepcopy(model), x)
        fused, chains = fused_model(copy.deepcopy(model))
        counted = norms(fused, x)
        found = [plain, enabled, results(fused, x), formats]
        if arguments.compile:
            torch._dynamo.reset()
            results(torch.compile(fused_model(model)[0], backend="aot_eager"), x)
    if arguments.why:
        for warning in said:
            if str(warning.message).startswith(("fuse", "convert")):
                print(f"  {warning.message}")
    parts = [
        ", ".join("-" if f is None else f"{apart(f[part], found[0][part]):.0e}" for f in found[1:])
        for part in ("output", "gradients")
    ]
    return f"{label} | {parts[0]} | {parts[1]} | {counted[0]}, {counted[1]}, {chains}"


def fused_model(model):
    """Return the model on fastbn, and how many norms have what follows them in the same pass."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("fastbn.torch")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        model = fastbn.torch.convert(model, fuse=True)
    finally:
        logger.removeHandler(handler)
    return model, records[-1].args[0]


def results(model, x):
    model.eval()
    with torch.no_grad():
        output = tensors_of(model(x))
    model.train()
    torch.manual_seed(2)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    sum(y.float().square().mean() for y in tensors_of(model(x))).backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    return {"output": output, "gradients": gradients}


def norms(model, x):
    """Return how many norms of a training step are nodes of fastbn's, and of PyTorch's."""
    torch.manual_seed(2)
    state = copy.deepcopy(model.state_dict())
    waiting = [y.grad_fn for y in tensors_of(model.train()(x))]
    model.load_state_dict(state)
    seen, mine, theirs = set(), 0, 0
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            mine += node.name().startswith("Normalise")
            theirs += node.name().startswith(("NativeBatchNorm", "NativeLayer", "NativeGroup"))
            waiting += [child for child, _ in node.next_functions]
    return mine, theirs


def tensors_of(y):
    if isinstance(y, torch.Tensor):
        return [y]
    values = y.values() if isinstance(y, dict) else y
    return [t for value in values if value is not None for t in tensors_of(value)]


def apart(found, expected):
    """Return the largest difference, in parts of the largest value of each tensor."""
    return max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))
        for a, b in zip(found, expected, strict=True)
    )


if __name__ == "__main__":
    main()

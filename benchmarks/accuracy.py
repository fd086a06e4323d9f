# SPDX-License-Identifier: BSD-3-Clause
"""Error of the batch variance beside NumPy and PyTorch, as a Markdown table.

python -m pip install ".[peers]" && python benchmarks/accuracy.py
"""

import numpy as np

import fastbn

try:
    import torch
except ImportError:
    torch = None

SHAPE = (32, 64, 56, 56)


def error(var: np.ndarray, exact: np.ndarray) -> float:
    return float((np.abs(var - exact) / exact).max())


def torch_var(x: np.ndarray, channels_last: bool) -> np.ndarray:
    tensor = torch.from_numpy(x)
    if channels_last:
        tensor = tensor.to(memory_format=torch.channels_last)
    running = torch.zeros(x.shape[1]), torch.zeros(x.shape[1])
    torch.nn.functional.batch_norm(tensor, *running, training=True, momentum=1.0)
    n = x.size // x.shape[1]
    return running[1].double().numpy() * (n - 1) / n


def main() -> None:
    names = ["mean / std", "fastbn NCHW", "fastbn NHWC", "NumPy float32", "NumPy float64"]
    if torch:
        names += ["PyTorch NCHW", "PyTorch NHWC"]
    print("|", " | ".join(names), "|")
    print("|", " | ".join("---" for _ in names), "|")
    for mean in (0.0, 1.0, 1e3, 1e5):
        x = np.random.default_rng(0).standard_normal(SHAPE)
        x = (x + mean).astype(np.float32)
        planes = x.transpose(1, 0, 2, 3).reshape(SHAPE[1], -1)
        exact = np.array([plane.astype(np.longdouble).var() for plane in planes])
        last = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
        variances = [
            fastbn.batch_stats(x).var(),
            fastbn.batch_stats(last, layout="NHWC").var(),
            x.var((0, 2, 3)),
            x.var((0, 2, 3), dtype=np.float64),
        ]
        if torch:
            variances += [torch_var(x, False), torch_var(x, True)]
        print(f"| {mean:g} |", " | ".join(f"{error(var, exact):.1e}" for var in variances), "|")


if __name__ == "__main__":
    main()

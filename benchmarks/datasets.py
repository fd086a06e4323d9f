# SPDX-License-Identifier: BSD-3-Clause
"""Statistics of data sets beside what people use, from files in the page cache.

    python -m benchmarks.datasets [--megabytes 1000]

A .npy of uint8, a Zarr store (blosc) and a folder of PNG, each with `fastbn.data.stats` in one
process, beside reading or decoding alone; Dask, StandardScaler.partial_fit, xarray, a PyTorch
DataLoader and gdalinfo, those that are installed, on the same data or a tenth of it. Then a
sparse file of 10 GiB under a limit of 2 GiB of address space. Prints Markdown. A rate is that
of the bytes of the arrays. The best of three runs, of slow peers of one. Needs an idle machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastbn import data
from fastbn.data.blocks import WINDOW

Row = tuple[str, str, float, int]


def seconds(run: Callable[[], Any], times: int = 3) -> float:
    best = float("inf")
    for _ in range(times):
        begin = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begin)
    return best


def has(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


# ---- the data


def photographs(count: int, size: int) -> np.ndarray:
    """Smooth images with some noise, which compress about as photographs do."""
    rng = np.random.default_rng(2)
    ramp = np.linspace(0, 220, size)
    base = (ramp[:, None, None] + ramp[None, :, None]) / 2 + np.array([0, 15, 30])
    shifts = rng.integers(0, 10, (count, 1, 1, 3))
    noise = rng.integers(0, 4, (count, size, size, 3))
    return (base + shifts + noise).clip(0, 255).astype(np.uint8)


def prepare(folder: Path, megabytes: int) -> None:
    size = 224
    count = max(10, megabytes * 1_000_000 // (size * size * 3))
    some = photographs(min(count, 256), size)
    array = np.lib.format.open_memmap(folder / "x.npy", "w+", np.uint8, (count, size, size, 3))
    for begin in range(0, count, len(some)):
        part = array[begin : begin + len(some)]
        part[:] = some[: len(part)]
    del array
    if has("zarr"):
        import zarr

        blosc = zarr.codecs.BloscCodec(cname="lz4", clevel=5, shuffle="noshuffle")
        store = zarr.create_array(
            folder / "x.zarr",
            shape=(len(some), size, size, 3),
            chunks=(16, size, size, 3),
            dtype="u1",
            compressors=[blosc],
        )
        store[:] = some
    if has("PIL"):
        import PIL.Image

        (folder / "png").mkdir()
        for number, image in enumerate(some[:128]):
            PIL.Image.fromarray(image).save(folder / "png" / f"{number:04}.png")


# ---- what is measured


def npy(folder: Path) -> Iterator[Row]:
    path = folder / "x.npy"
    size, kind = path.stat().st_size, "npy"
    buffer = bytearray(WINDOW)

    def read() -> None:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    yield kind, "reading alone", seconds(read), size
    yield kind, "fastbn.data.stats", seconds(lambda: data.stats(path, layout="NHWC")), size
    yield kind, "fastbn.data.stats, 2 workers", seconds(
        lambda: data.stats(path, layout="NHWC", workers=2)), size  # fmt: skip
    array = np.load(path, mmap_mode="r")
    array = array[: max(1, len(array) // 10)]
    size = array.nbytes
    if has("dask"):
        import dask.array as da

        import fastbn.dask

        x = da.from_array(array, chunks=(64, *array.shape[1:]))
        axes = (0, 1, 2)
        mean_and_std = da.stack([x.mean(axes), x.std(axes)])
        for scheduler in "synchronous", "threads":
            run = lambda s=scheduler: mean_and_std.compute(scheduler=s)  # noqa: E731
            yield kind, f"Dask mean and std, {scheduler}", seconds(run, 1), size
        ours = fastbn.dask.batch_stats(x, layout="NHWC", compute=False)
        yield kind, "fastbn.dask.batch_stats, threads", seconds(
            lambda: ours.compute(scheduler="threads")), size  # fmt: skip
    if has("sklearn"):
        from sklearn.preprocessing import StandardScaler

        def partial_fit() -> None:
            scaler = StandardScaler()
            for begin in range(0, len(array), 64):
                scaler.partial_fit(array[begin : begin + 64].reshape(-1, 3))

        yield kind, "StandardScaler.partial_fit", seconds(partial_fit, 1), size
    if has("xarray"):
        import xarray

        dataset = xarray.DataArray(array, dims=list("nhwc"))
        run = lambda: (dataset.mean(list("nhw")), dataset.std(list("nhw")))  # noqa: E731
        yield kind, "xarray mean and std", seconds(run, 1), size
    if has("torch"):
        yield kind, "PyTorch DataLoader, sums of float32", seconds(lambda: loader(array), 1), size


def loader(array: np.ndarray) -> None:
    """The loop of the tutorials: images to floats on the unit interval, sums of both powers."""
    import torch

    class Images(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(array)

        def __getitem__(self, i: int) -> torch.Tensor:
            return torch.from_numpy(array[i].copy()).permute(2, 0, 1).float() / 255

    total = squares = torch.zeros(3)
    for batch in torch.utils.data.DataLoader(Images(), batch_size=64):
        total = total + batch.sum((0, 2, 3))
        squares = squares + (batch**2).sum((0, 2, 3))


def stores(folder: Path) -> Iterator[Row]:
    if (folder / "x.zarr").exists():
        import zarr

        array = zarr.open_array(folder / "x.zarr", mode="r")
        step, size = array.chunks[0], array.nbytes

        def decode() -> None:
            for begin in range(0, array.shape[0], step):
                array[begin : begin + step]

        yield "zarr", "decoding alone", seconds(decode), size
        run = lambda: data.stats(folder / "x.zarr", layout="NHWC")  # noqa: E731
        yield "zarr", "fastbn.data.stats", seconds(run), size
    if (folder / "png").exists():
        yield from images(folder / "png")


def images(folder: Path) -> Iterator[Row]:
    import PIL.Image

    paths = sorted(folder.iterdir())
    size = sum(np.asarray(PIL.Image.open(path)).nbytes for path in paths)

    def decode() -> None:
        for path in paths:
            with PIL.Image.open(path) as image:
                np.asarray(image)

    yield "png", "decoding alone", seconds(decode), size
    for workers in 1, 2:
        run = lambda w=workers: data.stats(folder, workers=w)  # noqa: E731
        yield "png", f"fastbn.data.stats, {workers} workers", seconds(run), size
    if shutil.which("gdalinfo"):

        def gdal() -> None:
            for path in paths:
                subprocess.run(["gdalinfo", "-stats", "--config", "GDAL_PAM_ENABLED", "NO", path],
                               check=True, capture_output=True)  # fmt: skip

        yield "png", "gdalinfo -stats", seconds(gdal, 1), size


SPARSE = """
import resource, sys, time
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
from fastbn import data
from fastbn.data.blocks import WINDOW
def anonymous():
    with open("/proc/self/status") as file:
        return int(next(l for l in file if l.startswith("RssAnon")).split()[1])
before, begin = anonymous(), time.perf_counter()
data.stats(sys.argv[1], layout="NC")
print(f"{time.perf_counter() - begin:.1f} s, {(anonymous() - before) / 1024:.1f} MiB more")
"""


def sparse(folder: Path) -> str:
    with (folder / "sparse.npy").open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (10 << 20, 1024)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + (10 << 30))
    command = [sys.executable, "-c", SPARSE, str(folder / "sparse.npy")]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    return run.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=int, default=1000)
    megabytes = parser.parse_args().megabytes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, megabytes)
        print("| source | by | s | MB/s | to reading or decoding alone |")
        print("| --- | --- | --- | --- | --- |")
        alone = {}
        for make in npy, stores:
            for kind, by, taken, size in make(folder):
                rate = size / taken / 1e6
                alone.setdefault(kind, rate)
                print(
                    f"| {kind} | {by} | {taken:.3f} | {rate:.0f} | {rate / alone[kind]:.3f} |",
                    flush=True,
                )
        print(f"\nA sparse file of 10 GiB under 2 GiB of address space: {sparse(folder)}.")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: BSD-3-Clause
"""From what a user names to parts: paths, folders, globs, lists, open arrays, iterables.

One function for each kind of file; `open_source` finds it. Reads headers only.
"""

from __future__ import annotations

import functools
import glob
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastbn._numpy import binding
from fastbn.data._libraries import library
from fastbn.data.blocks import chunk_block
from fastbn.data.raw import RawArray, open_npy, open_npz
from fastbn.data.sources import (
    ArrayPart,
    BrokenPart,
    ImagePart,
    Part,
    channel_axis,
    of_array,
    of_data_array,
    of_raw,
)

TIFF = (".tif", ".tiff")
HDF5 = (".h5", ".hdf5", ".he5", ".hdf")
NETCDF = (".nc", ".nc4", ".netcdf")
IMAGE_LAYOUTS = (None, "NHWC", "HWC", "N...C")
_OLD_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".pnm", *TIFF)


@dataclass
class Source:
    """The parts of a source; an iterable has no list of them before it has been read."""

    parts: Iterable[Part]
    listed: bool = True

    def known(self) -> list[Part]:
        """Return the parts of files and arrays."""
        return list(self.parts) if self.listed else []


def open_source(source: Any, layout: str | None, mode: str | None = None) -> Source:
    """Return the parts of a source, in its order."""
    binding.check_layout(layout)
    if mode is not None and not isinstance(mode, str):
        raise TypeError(f"mode: expected a string such as 'RGB', or None, got {mode!r}")
    if isinstance(source, (str, os.PathLike)):
        return Source(parts_of_path(Path(source), layout, mode))
    if isinstance(source, (list, tuple)):
        return Source(
            [part for i, item in enumerate(source) for part in _item(item, i, layout, mode)]
        )
    part = _open_array(source, "source", layout)
    if part is not None:
        return Source([part])
    if not isinstance(source, Iterable) or isinstance(source, (bytes, dict)):
        raise TypeError(
            "source: expected a path, an array, a list of them or an iterable of arrays, "
            f"got {type(source).__name__}"
        )
    return Source(_parts_of_iterable(source, layout), listed=False)


def _item(item: Any, number: int, layout: str | None, mode: str | None) -> list[Part]:
    if isinstance(item, (str, os.PathLike)):
        return parts_of_path(Path(item), layout, mode)
    part = _open_array(item, f"source[{number}]", layout)
    if part is None:
        raise TypeError(f"source[{number}]: expected a path or an array, got {item!r}")
    return [part]


# ---- open arrays


def _open_array(value: Any, name: str, layout: str | None) -> ArrayPart | None:
    """Return the part of an open array of any library, or None if it is none."""
    if isinstance(value, np.lib.npyio.NpzFile):
        if len(value.files) != 1:
            raise ValueError(f"{name}: expected one array in the .npz, got {value.files}")
        value = value[value.files[0]]
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return of_array(name, _array_of_tensor(value), layout)
    if hasattr(value, "variable") and hasattr(value, "dims"):
        return of_data_array(name, value, layout)
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected an array without a mask, got a masked array")
    if type(value).__module__.startswith("PIL."):
        return of_array(name, np.asarray(value), layout or "HWC")
    if all(hasattr(value, member) for member in ("shape", "dtype", "__getitem__")):
        return of_array(name, value, layout)
    return None


def _array_of_tensor(tensor: Any) -> np.ndarray[Any, Any]:
    tensor = tensor.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":
        bfloat16 = library("ml_dtypes", "bfloat16").bfloat16
        return tensor.view(sys.modules["torch"].uint16).numpy().view(bfloat16)
    return tensor.numpy()


def _parts_of_iterable(source: Iterable[Any], layout: str | None) -> Iterator[Part]:
    loader = type(source).__module__.startswith("torch.utils.data")
    for number, item in enumerate(source):
        if loader and isinstance(item, (list, tuple)):
            item = item[0]
        part = _open_array(item, f"source: array {number}", layout)
        if part is None:
            raise TypeError(
                f"source: expected arrays, got {type(item).__name__} as number {number}"
            )
        yield part


# ---- paths


def parts_of_path(path: Path, layout: str | None, mode: str | None) -> list[Part]:
    """Return the parts of a file, a folder, a glob, or an array within a store."""
    if path.is_dir():
        if _is_zarr(path):
            return [_zarr(path, layout)]
        return _folder(path, layout, mode)
    if path.is_file():
        return [_file(path, None, layout, mode)]
    for store in path.parents:
        if store.is_file():
            return [_file(store, path.relative_to(store).as_posix(), layout, mode)]
        if store.is_dir():
            if _is_zarr(store):
                raise ValueError(f"{path}: expected an array in {store}, found none of this name")
            break
    if glob.has_magic(str(path)):
        found = sorted(glob.glob(str(path), recursive=True))
        if not found:
            raise FileNotFoundError(f"{path}: no file has such a name")
        return [part for name in found for part in parts_of_path(Path(name), layout, mode)]
    raise FileNotFoundError(f"{path}: no such file or folder")


def _is_image(path: Path) -> bool:
    suffix = path.suffix.lower()
    return suffix in _OLD_IMAGES or suffix in _image_suffixes()


@functools.cache
def _image_suffixes() -> dict[str, str]:
    try:
        import PIL.Image
    except ImportError:
        return {}
    suffixes: dict[str, str] = PIL.Image.registered_extensions()
    others = (*HDF5, *NETCDF, ".pdf", ".mpg", ".mpeg", ".grib")
    return {suffix: name for suffix, name in suffixes.items() if suffix not in others}


def _folder(folder: Path, layout: str | None, mode: str | None) -> list[Part]:
    images = sorted(path for path in folder.rglob("*") if _is_image(path) and path.is_file())
    if not images:
        raise ValueError(f"{folder}: no images below this folder")
    return [_file(path, None, layout, mode) for path in images]


def _file(path: Path, inner: str | None, layout: str | None, mode: str | None) -> Part:
    """Return the part of a file; what cannot be read names the file."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".npz" or (suffix in HDF5) or (suffix in NETCDF):
            opened: Callable[[Path, str | None, str | None], Part]
            opened = _npz if suffix == ".npz" else _hdf5 if suffix in HDF5 else _netcdf
            return opened(path, inner, layout)
        if inner is not None:
            raise ValueError(f"expected a store with arrays, to find {inner!r} in it")
        if suffix == ".npy":
            return of_raw(str(path), open_npy(path), layout, path)
        if suffix in TIFF and mode is None:
            return _tiff(path, layout)
        if _is_image(path):
            if layout not in IMAGE_LAYOUTS:
                raise ValueError(f"layout: expected 'NHWC' for images, or none, got {layout!r}")
            library("PIL.Image")
            return ImagePart(path, mode)
    except (ImportError, TypeError):
        raise
    except Exception as error:
        if suffix in TIFF:
            return BrokenPart(path, error)
        raise ValueError(f"{path}: {error}") from error
    raise ValueError(f"{path}: not a kind of file that is read")


def _npz(path: Path, inner: str | None, layout: str | None) -> Part:
    raw, name = open_npz(path, inner)
    return of_raw(f"{path}/{name}", raw, layout, path)


def _only(names: list[str], inner: str | None, path: Path) -> str:
    """Return the name that was asked for, or that of the only array there is."""
    if inner is None and len(names) == 1:
        return names[0]
    if inner not in names:
        raise ValueError(f"expected {path.name}/NAME with one of {names}, got {inner!r}")
    return inner


def _hdf5(path: Path, inner: str | None, layout: str | None) -> Part:
    h5py = library("h5py")
    file = h5py.File(path, "r")
    names: list[str] = []
    file.visititems(lambda name, node: names.append(name) if hasattr(node, "dtype") else None)
    name = _only(names, inner, path)
    return of_array(f"{path}/{name}", file[name], layout, path)


def _netcdf(path: Path, inner: str | None, layout: str | None) -> Part:
    xarray = library("xarray")
    group, _, variable = (inner or "").rpartition("/")
    data = xarray.open_dataset(path, group=group or None)
    name = _only([str(name) for name in data.data_vars], variable or None, path)
    part = of_data_array(f"{path}/{f'{group}/' if group else ''}{name}", data[name], layout)
    part.path = path
    return part


# ---- Zarr


def _is_zarr(path: Path) -> bool:
    return any((path / name).is_file() for name in ("zarr.json", ".zarray", ".zgroup"))


def _zarr(path: Path, layout: str | None) -> Part:
    zarr = library("zarr")
    node = zarr.open(str(path), mode="r")
    name = str(path)
    if not hasattr(node, "shape"):
        arrays = dict(node.arrays())
        if len(arrays) != 1:
            raise ValueError(f"{path}: expected the path of an array, this group has {[*arrays]}")
        [(inner, node)] = arrays.items()
        name = f"{path}/{inner}"
    return of_array(name, node, layout, path)


# ---- TIFF


def _tiff(path: Path, layout: str | None) -> Part:
    tifffile = library("tifffile")
    with tifffile.TiffFile(path) as file:
        series = file.series[0]
        axes, shape, dtype = series.axes, tuple(series.shape), np.dtype(series.dtype)
        dtype = dtype.newbyteorder(file.byteorder)
        offset = series.dataoffset
    axis = _tiff_axis(axes, shape, layout)
    shape, axis = (shape, axis) if axis is not None else ((*shape, 1), len(shape))
    if offset is not None:
        raw = RawArray(lambda: path.open("rb", buffering=0), offset, dtype, shape)
        part = ArrayPart(str(path), shape, dtype, raw.block(), axis, raw.read, path)
    else:
        part = _compressed_tiff(path, shape, axis, dtype.newbyteorder("="))
    # Files of one folder are images, whatever reads them.
    part.is_image = len(shape) == 3
    return part


def _tiff_axis(axes: str, shape: tuple[int, ...], layout: str | None) -> int | None:
    if layout not in IMAGE_LAYOUTS:
        return channel_axis(layout, shape)
    for letter in "SC":
        if letter in axes:
            return axes.index(letter)
    return None


def _compressed_tiff(
    path: Path, shape: tuple[int, ...], axis: int, dtype: np.dtype[Any]
) -> ArrayPart:
    """Return the part of tiles or strips: by groups of them if the image is large."""
    tifffile = library("tifffile")
    inner = shape[:-1] if axis == len(shape) - 1 and shape[-1] == 1 else shape

    if math.prod(shape) * dtype.itemsize <= 16 << 20:

        def read(index: Any) -> Any:
            return tifffile.imread(path).reshape(shape)[index]

        return ArrayPart(str(path), shape, dtype, shape, axis, read, path)
    zarr = library("zarr")
    array = zarr.open_array(tifffile.imread(path, aszarr=True), mode="r")
    block = chunk_block(array.shape, array.chunks, dtype.itemsize)
    added = (1,) * (len(shape) - array.ndim)

    def read_tiles(index: Any) -> Any:
        tiles = np.asarray(array[index[: array.ndim]])
        return tiles.reshape(tiles.shape + added)

    assert tuple(array.shape) in (inner, shape)
    return ArrayPart(str(path), shape, dtype, (*block, *added), axis, read_tiles, path)

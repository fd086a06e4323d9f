# SPDX-License-Identifier: BSD-3-Clause
"""Each kind of source has the statistics of its array, whatever the units and workers are."""

import doctest
import subprocess
import sys

import numpy as np
import pytest
from exact import assert_exact, bits
from extras import need
from hypothesis import given, settings
from hypothesis import strategies as st

import fastbn
from fastbn import data
from fastbn.data import blocks

RNG = np.random.default_rng(5)
X = RNG.integers(0, 256, (7, 5, 6, 3), dtype=np.uint8)


@pytest.fixture
def small_windows(monkeypatch):
    """Units of 64 bytes, so that small arrays have many."""
    for function in (blocks.contiguous_block, blocks.chunk_block):
        monkeypatch.setattr(function, "__defaults__", (64,))


def save_npy(folder, x):
    np.save(folder / "x.npy", x)
    return folder / "x.npy"


def save_fortran(folder, x):
    np.save(folder / "f.npy", np.asfortranarray(x))
    return folder / "f.npy"


def save_swapped(folder, x):
    np.save(folder / "s.npy", x.astype(x.dtype.newbyteorder(">")))
    return folder / "s.npy"


def save_npz(folder, x):
    np.savez(folder / "x.npz", x=x, other=x[:1])
    return folder / "x.npz" / "x"


def save_compressed(folder, x):
    np.savez_compressed(folder / "c.npz", only=x)
    return folder / "c.npz"


def save_hdf5(folder, x):
    with need("h5py").File(folder / "x.h5", "w") as file:
        file.create_dataset("a/b", data=x, chunks=(2, *x.shape[1:]))
        file["other"] = x
    return folder / "x.h5" / "a" / "b"


def save_zarr(version, **options):
    def save(folder, x):
        name = folder / f"v{version}{'s' if options else ''}.zarr"
        group = need("zarr").open_group(str(name), mode="w", zarr_format=version)
        shape = x.shape
        array = group.create_array(
            "g/x", shape=shape, dtype=x.dtype, chunks=(1, *shape[1:]), **options
        )
        array[:] = x
        return name / "g" / "x"

    return save


def save_sharded(folder, x):
    return save_zarr(3, shards=(3, *x.shape[1:]))(folder, x)


def save_netcdf(folder, x):
    need("h5netcdf")
    array = need("xarray").DataArray(x, dims=[f"d{i}" for i in range(x.ndim)])
    array.to_dataset(name="v").to_netcdf(folder / "x.nc", engine="h5netcdf")
    return folder / "x.nc"


SAVERS = [save_npy, save_fortran, save_swapped, save_npz, save_compressed, save_hdf5,
          save_zarr(2), save_zarr(3), save_sharded, save_netcdf]  # fmt: skip


@pytest.mark.parametrize("layout", ["NHWC", "CNHW", "NCHW", None])
@pytest.mark.parametrize("save", SAVERS)
def test_files_have_the_statistics_of_their_array(tmp_path, save, layout, small_windows):
    path = save(tmp_path, X)
    axis = 1 if layout is None else layout.index("C")
    expected = bits(fastbn.batch_stats(X, layout=layout))
    for workers in 1, 3:
        stats = data.stats(path, layout=layout, workers=workers)
        assert bits(stats) == expected
    assert_exact(stats, X, axis)
    floats = save(tmp_path, (X / 7).astype(np.float32)) if save is save_npy else None
    if floats is not None:
        one, three = (data.stats(floats, layout=layout, workers=n) for n in (1, 3))
        assert bits(one) == bits(three)
        moved = np.moveaxis(X / 7, axis, 0).reshape(X.shape[axis], -1)
        np.testing.assert_allclose(one.mean, moved.mean(1), rtol=1e-6)
        np.testing.assert_allclose(one.var(), moved.var(1), rtol=3e-6)


def test_open_arrays_lists_and_iterables(tmp_path):
    expected = bits(fastbn.batch_stats(X, layout="NHWC"))
    opened = np.lib.format.open_memmap(save_npy(tmp_path, X), "r")
    halves = [X[:3], X[3:]]
    sources = [X, X[:, ::-1], opened, halves, tuple(halves), iter(halves), (h for h in halves)]
    for source in sources:
        assert bits(data.stats(source, layout="NHWC", workers=2)) == expected
    h5py = need("h5py")
    path = save_hdf5(tmp_path, X).parents[1]
    with h5py.File(path) as file:
        assert bits(data.stats(file["a/b"], layout="NHWC")) == expected
    array = need("zarr").open_array(str(save_sharded(tmp_path, X)), mode="r")
    assert bits(data.stats(array, layout="NHWC")) == expected
    opened = need("xarray").open_dataset(save_netcdf(tmp_path, X))["v"]
    assert bits(data.stats(opened, layout="NHWC")) == expected


def test_globs_and_lists_of_paths(tmp_path):
    for i, part in enumerate(np.split(X, [2, 5])):
        np.save(tmp_path / f"p{i}.npy", part)
    expected = bits(fastbn.batch_stats(X, layout="NHWC"))
    assert bits(data.stats(str(tmp_path / "p*.npy"), layout="NHWC")) == expected
    names = [str(path) for path in sorted(tmp_path.glob("p*.npy"), reverse=True)]
    assert bits(data.stats(names, layout="NHWC")) == expected


def test_a_data_loader_gives_its_first_item():
    torch = pytest.importorskip("torch")
    dataset = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.zeros(7))
    loader = torch.utils.data.DataLoader(dataset, batch_size=2)
    expected = bits(fastbn.batch_stats(X, layout="NHWC"))
    assert bits(data.stats(loader, layout="NHWC")) == expected


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=2, max_size=4), st.data(),
    st.sampled_from(["propagate", "omit"]), st.sampled_from([None, 2.0]),
)  # fmt: skip
def test_any_cut_of_floats(shape, draw, nan_policy, nodata):
    axis = draw.draw(st.integers(0, len(shape) - 1))
    rng = np.random.default_rng(len(shape))
    x = rng.integers(0, 4, shape).astype(np.float32)
    x[rng.random(shape) < 0.2] = np.nan
    layout = "".join("C" if i == axis else letter for i, letter in enumerate("ABDE"[: len(shape)]))
    options = {"layout": layout, "nan_policy": nan_policy, "nodata": nodata}
    whole = fastbn.batch_stats(x, **options)
    parts = [np.array(part) for part in np.array_split(x, 2, axis=(axis + 1) % len(shape))]
    cut = data.stats(parts, **options)
    assert np.array_equal(cut.count, whole.count)
    np.testing.assert_allclose(cut.mean, whole.mean, rtol=1e-6, atol=1e-12)
    np.testing.assert_array_equal(cut.min, whole.min)


# ---- images


def save_image(path, mode, size=(6, 5), **options):
    image = need("PIL.Image")
    bands = len(need("PIL.ImageMode").getmode(mode).bands)
    x = RNG.integers(0, 256, (size[1], size[0], bands), dtype=np.uint8)
    image.fromarray(x[:, :, 0] if bands == 1 else x, mode if mode == "CMYK" else None).save(
        path, **options
    )
    return x


def test_images_of_any_size_and_mode(tmp_path):
    images = [save_image(tmp_path / f"{i}.png", "RGB", (i + 1, 9 - i)) for i in range(4)]
    (tmp_path / "notes.txt").write_text("no image")
    rows = np.concatenate([image.reshape(-1, 3) for image in images])
    for workers in 1, 2:
        assert bits(data.stats(tmp_path, workers=workers)) == bits(fastbn.batch_stats(rows))
    save_image(tmp_path / "grey.png", "L")
    with pytest.raises(ValueError, match=r"1 channels: .*grey\.png"):
        data.stats(tmp_path)
    need("PIL.Image").new("P", (3, 3)).save(tmp_path / "palette.gif")
    save_image(tmp_path / "c.jpg", "CMYK")
    save_image(tmp_path / "alpha.png", "RGBA")
    assert data.stats(tmp_path, mode="RGB").count[0] == len(rows) + 30 + 9 + 30 + 30


def test_a_palette_counts_as_what_it_expands_to(tmp_path):
    image = need("PIL.Image").new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    image.save(tmp_path / "p.png")
    assert data.stats(tmp_path / "p.png").mean.tolist() == [25, 35, 45]


def test_a_file_that_cannot_be_read_names_itself(tmp_path):
    save_image(tmp_path / "good.png", "RGB")
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"bad\.png"):
        data.stats(tmp_path)


@pytest.mark.parametrize(
    ("axes", "shape"),
    [
        ("YXS", (9, 8, 3)),
        ("SYX", (3, 9, 8)),
        ("YX", (9, 8)),
        ("CYX", (4, 9, 8)),
        ("ZCYX", (2, 3, 9, 8)),
    ],
)
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_tiff_has_the_channels_of_its_axes(tmp_path, axes, shape, compression):
    tifffile = need("tifffile")
    x = RNG.integers(0, 60000, shape, dtype=np.uint16)
    options = (
        {"photometric": "rgb"}
        if "S" in axes
        else {"photometric": "minisblack", "metadata": {"axes": axes}}
    )
    if axes == "SYX":
        options["planarconfig"] = "separate"
    tifffile.imwrite(tmp_path / "x.tif", x, compression=compression, **options)
    letter = next((letter for letter in "SC" if letter in axes), None)
    rows = x.reshape(-1, 1) if letter is None else np.moveaxis(x, axes.index(letter), -1)
    expected = fastbn.batch_stats(rows, layout="N...C")
    assert bits(data.stats(tmp_path / "x.tif")) == bits(expected)


# ---- what is refused, and how much memory


def test_errors(tmp_path):
    for source, kind, text in [
        (3, TypeError, "source: expected a path"), (tmp_path, ValueError, "no images below"),
        (tmp_path / "no.npy", FileNotFoundError, r"no\.npy"), ([3], TypeError, r"source\[0\]"),
        (iter([]), ValueError, "nothing to count"), (np.ones((2, 2), int), TypeError, "int64"),
        (tmp_path / "*.npy", FileNotFoundError, "no file"), ({}, TypeError, "source"),
    ]:  # fmt: skip
        with pytest.raises(kind, match=text):
            data.stats(source)
    for wrong, kind in (
        ({"workers": 0}, ValueError),
        ({"workers": 1.5}, TypeError),
        ({"layout": "NHC"}, ValueError),
        ({"nan_policy": "x"}, ValueError),
        ({"mode": 3}, TypeError),
    ):
        with pytest.raises(kind, match=next(iter(wrong))):
            data.stats(X, **wrong)
    path = save_npy(tmp_path, X)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"x\.npy: .*shorter"):
        data.stats(path)


@pytest.mark.skipif(sys.platform != "linux", reason="limits address space")
def test_a_sparse_file_needs_no_memory(tmp_path):
    # The size of the issue, 10 GiB, takes seconds: benchmarks.datasets has it.
    with (tmp_path / "x.npy").open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (3 << 20, 1024)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + (3 << 30))
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
from fastbn import data
stats = data.stats({str(tmp_path / "x.npy")!r}, layout="NC")
assert stats.count[0] == 3 << 20 and stats.mean.max() == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_docstrings():
    assert doctest.testmod(data) == (0, 6)

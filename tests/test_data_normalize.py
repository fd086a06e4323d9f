# SPDX-License-Identifier: BSD-3-Clause
"""data.normalize writes what fastbn.normalize returns, or nothing under its name."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from extras import need
from test_data_sources import RNG, X, save_image

import fastbn
from fastbn import data
from fastbn.data import blocks

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]


def load(path):
    if path.suffix == ".npy":
        return np.load(path)
    return need("zarr").open_array(str(path), mode="r")[:]


@pytest.fixture(params=[None, 64])
def windows(request, monkeypatch):
    if request.param:
        for function in (blocks.contiguous_block, blocks.chunk_block):
            monkeypatch.setattr(function, "__defaults__", (request.param,))


@pytest.mark.parametrize("suffix", [".npy", ".zarr"])
@pytest.mark.parametrize("out_layout", [None, "NCHW", "CHWN", "NHWC"])
def test_it_is_normalize(tmp_path, windows, suffix, out_layout):
    if suffix == ".zarr":
        need("zarr")
    options = {"layout": "NHWC", "out_layout": out_layout, "max_value": 255}
    expected = fastbn.normalize(X, MEAN, STD, **options)
    np.save(tmp_path / "f.npy", np.asfortranarray(X))
    np.save(tmp_path / "a.npy", X[:2])
    np.save(tmp_path / "b.npy", X[2:])
    sources = [X, tmp_path / "f.npy", str(tmp_path / "[ab].npy"), [X[:3], X[3:]]]
    for number, source in enumerate(sources):
        destination = tmp_path / f"{number}{suffix}"
        data.normalize(source, destination, (MEAN, STD), workers=1 + number % 2, **options)
        np.testing.assert_array_equal(load(destination), expected)
        assert not (tmp_path / f"{number}{suffix}.partial").exists()


def test_images_are_stacked(tmp_path):
    images = [save_image(tmp_path / f"{i}.png", "RGB") for i in range(3)]
    stats = data.stats(tmp_path)
    data.normalize(
        tmp_path, tmp_path / "y.npy", stats, layout="NHWC", out_layout="NCHW", dtype="float16"
    )
    expected = fastbn.normalize(
        np.stack(images),
        stats.mean,
        stats.std(),
        layout="NHWC",
        out_layout="NCHW",
        dtype=np.float16,
    )
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), expected)
    save_image(tmp_path / "other.png", "RGB", (2, 2))
    with pytest.raises(ValueError, match=r"other\.png: expected shape"):
        data.normalize(tmp_path, tmp_path / "z.npy", stats)
    assert not (tmp_path / "z.npy.partial").exists()


def test_statistics_from_files(tmp_path):
    published = tmp_path / "p.json"
    published.write_text(json.dumps({"mean": MEAN, "std": STD}))
    data.normalize(X, tmp_path / "y.npy", published, layout="NHWC", max_value=255)
    expected = fastbn.normalize(X, MEAN, STD, layout="NHWC", max_value=255)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), expected)
    with pytest.raises(ValueError, match="max_value"):
        data.normalize(X, tmp_path / "z.npy", data.stats(X, layout="NHWC"), max_value=255)


def test_what_exists_is_not_touched(tmp_path):
    target = tmp_path / "y.npy"
    for existing in target, tmp_path / "y.npy.partial":
        existing.write_bytes(b"mine")
        for resume in (False, True) if existing == target else (False,):
            with pytest.raises(FileExistsError, match=existing.name):
                data.normalize(X, target, (1, 1), resume=resume)
        assert existing.read_bytes() == b"mine"
        existing.unlink()


def test_wrong_arguments_leave_nothing(tmp_path):
    for options, kind in [
        ({"stats": (1, 0)}, ValueError), ({"stats": ([1, 2], 1)}, ValueError),
        ({"stats": 3}, TypeError), ({"dtype": "int8"}, TypeError), ({"layout": "NC"}, ValueError),
        ({"out_layout": "NCHW"}, ValueError), ({"max_value": 0}, ValueError),
        ({"source": iter([X])}, TypeError), ({"destination": tmp_path / "y.txt"}, ValueError),
        ({"workers": 0}, ValueError),
    ]:  # fmt: skip
        arguments = {"source": X, "destination": tmp_path / "y.npy", "stats": (1, 1)} | options
        with pytest.raises(kind):
            data.normalize(**arguments)
        assert not list(tmp_path.iterdir())


def test_empty_arrays(tmp_path):
    data.normalize(X[:0], tmp_path / "y.npy", (MEAN, STD), layout="NHWC", out_layout="NCHW")
    assert np.load(tmp_path / "y.npy").shape == (0, 3, 5, 6)


def test_resume_refuses_another_run(tmp_path, monkeypatch, windows):
    source = tmp_path / "x.npy"
    np.save(source, X)
    target = tmp_path / "y.npy"
    arguments = {"stats": (MEAN, STD), "layout": "NHWC"}
    calls = iter(range(99))
    real = fastbn.normalize

    def failing(x, *args, **options):
        if x.size and next(calls) >= 0:
            raise OSError("no space")
        return real(x, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(fastbn, "normalize", failing)
        with pytest.raises(OSError, match="no space"):
            data.normalize(source, target, **arguments)
    partial = tmp_path / "y.npy.partial"
    before = {path: path.read_bytes() for path in partial.iterdir()}
    for other in {"stats": (MEAN, [1, 1, 1])}, {"dtype": "float64"}, {"max_value": 2.0}:
        with pytest.raises(ValueError, match="resume"):
            data.normalize(source, target, resume=True, **(arguments | other))
    assert before == {path: path.read_bytes() for path in partial.iterdir()}
    data.normalize(source, target, resume=True, **arguments)
    np.testing.assert_array_equal(np.load(target), real(X, MEAN, STD, layout="NHWC"))


def test_resume_refuses_a_changed_source(tmp_path):
    source, target = tmp_path / "x.npy", tmp_path / "y.npy"
    np.save(source, X)
    code = CHILD.format(source=str(source), target=str(target), resume=False, stop=1)
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    os.utime(source, (1, 1))
    with pytest.raises(ValueError, match="resume"):
        data.normalize(source, target, (0.5, 0.25), layout="NHWC", resume=True)


# ---- interruptions: benchmarks/interruptions.py has a hundred of them

CHILD = """
import os
from fastbn.data import blocks, writing
writing.INTERVAL = 0
for function in (blocks.contiguous_block, blocks.chunk_block):
    function.__defaults__ = (256,)
from fastbn.data import journal
wrote = journal.Journal.wrote
def stopping(self, units):
    wrote(self, units)
    if 0 < {stop} <= len(self.done):
        os._exit(9)
journal.Journal.wrote = stopping
from fastbn import data
data.normalize({source!r}, {target!r}, (0.5, 0.25), layout="NHWC", resume={resume}, workers=2)
"""


@pytest.mark.parametrize("suffix", [".npy", ".zarr"])
def test_what_was_interrupted_goes_on(tmp_path, suffix):
    if suffix == ".zarr":
        need("zarr")
    source, target = tmp_path / "x.npy", tmp_path / f"y{suffix}"
    x = RNG.integers(0, 256, (64, 4, 4, 3), dtype=np.uint8)
    np.save(source, x)
    for number, stop in enumerate([3, 7, 8, 0]):
        assert not target.exists()
        code = CHILD.format(source=str(source), target=str(target), resume=number > 0, stop=stop)
        result = subprocess.run([sys.executable, "-c", code], check=False)
        assert result.returncode == (9 if stop else 0)
    np.testing.assert_array_equal(load(target), fastbn.normalize(x, 0.5, 0.25, layout="NHWC"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.npy", target.name]


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
def test_killed_at_any_moment(tmp_path):
    source, target = tmp_path / "x.npy", tmp_path / "y.npy"
    x = RNG.integers(0, 256, (3000, 8, 8, 3), dtype=np.uint8)
    np.save(source, x)
    expected = fastbn.normalize(x, 0.5, 0.25, layout="NHWC")
    code = CHILD.format(source=str(source), target=str(target), resume=True, stop=0)
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", code])
        time.sleep(random.uniform(0.2, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if target.exists():
            np.testing.assert_array_equal(np.load(target), expected)
            return
    subprocess.run([sys.executable, "-c", code], check=True)
    np.testing.assert_array_equal(np.load(target), expected)

# SPDX-License-Identifier: BSD-3-Clause
"""The command: its JSON merges exactly, its exit codes, its errors without traceback."""

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from exact import bits
from test_data_sources import RNG, X, save_image

import fastbn
from fastbn import data
from fastbn.data import _cli, files


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fastbn_(*arguments):
    return _cli.main([str(argument) for argument in arguments])


def strict(text):
    def refuse(name):
        raise ValueError(name)

    return json.loads(text, parse_constant=refuse)


KEYS = [
    "schema", "fastbn", "dtype", "layout", "channels", "count", "mean", "std", "m2", "min", "max",
    "omitted", "sum", "sum_of_squares", "inputs",
]  # fmt: skip


def test_json(folder, capsys):
    np.save("x.npy", X)
    assert fastbn_("stats", "x.npy", "--layout", "NHWC", "--json", "--checksum") == 0
    out, err = capsys.readouterr()
    found, stats = strict(out), fastbn.batch_stats(X, layout="NHWC")
    assert err == ""
    assert list(found) == KEYS
    assert (found["schema"], found["dtype"], found["layout"]) == (1, "uint8", "NHWC")
    for name in ("count", "mean", "m2", "min", "max"):
        assert found[name] == getattr(stats, name).tolist()
    assert found["std"] == stats.std().tolist()
    assert (found["sum"], found["sum_of_squares"]) == (stats.sum, stats.sum_of_squares)
    digest = hashlib.sha256((folder / "x.npy").read_bytes()).hexdigest()
    assert found["inputs"] == [{"name": "x.npy", "bytes": X.nbytes, "sha256": digest}]


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32", "float64", "float16"])
def test_files_merge_as_arrays_would(folder, dtype):
    parts = [part.astype(dtype) for part in np.split(X, [2, 5])]
    for number, part in enumerate(parts):
        if part.dtype.kind == "f":
            part[0, 0, 0] = [0.1, np.nan, np.inf]
        np.save(f"{number}.npy", part)
        assert fastbn_("stats", f"{number}.npy", "--layout", "NHWC", "-o", f"{number}.json") == 0
        strict((folder / f"{number}.json").read_text())
    assert fastbn_("merge", "0.json", "1.json", "2.json", "-o", "all.json") == 0
    stats = files.read(folder / "all.json").stats
    parts = [fastbn.batch_stats(part, layout="NHWC") for part in parts]
    assert bits(stats) == bits(fastbn.BatchStats.merge(parts))


def test_shards_and_orders_of_integers_have_the_same_bits(folder):
    for number, part in enumerate(np.split(X, 7)):
        np.save(f"{number}.npy", part)
    names = [f"{number}.npy" for number in range(7)]
    assert fastbn_("stats", *names, "--layout", "NHWC", "-o", "whole.json") == 0
    whole = strict((folder / "whole.json").read_text())
    for k in range(8):  # the last has nothing to count
        assert (
            fastbn_("stats", *names, "--layout", "NHWC", "--shard", f"{k}/8", "-o", f"{k}.json")
            == 0
        )
    for order in itertools.islice(itertools.permutations(range(8)), 0, 40320, 9001):
        assert fastbn_("merge", *(f"{k}.json" for k in order), "-o", "all.json") == 0
        merged = strict((folder / "all.json").read_text())
        assert sorted(i["name"] for i in merged.pop("inputs")) == names
        assert merged == {key: whole[key] for key in merged}


def test_the_bits_of_jobs(folder, capsys):
    np.save("x.npy", X)
    printed = []
    for jobs in 1, 2, 3:
        assert fastbn_("stats", "x.npy", "--layout", "NHWC", "--json", "--jobs", jobs) == 0
        printed.append(capsys.readouterr().out)
    assert len(set(printed)) == 1


def test_what_is_left_out(folder, capsys):
    x = np.array([[1, np.nan], [-9, 4], [3, 6]], np.float32)
    np.save("x.npy", x)
    assert fastbn_("stats", "x.npy", "--nan", "omit", "--nodata=-9", "--json") == 0
    found = strict(capsys.readouterr().out)
    assert (found["count"], found["omitted"], found["mean"]) == ([2, 2], [1, 1], [2, 5])
    assert fastbn_("stats", "x.npy", "--nan", "raise") == 2
    assert "x.npy" in capsys.readouterr().err
    assert fastbn_("stats", "x.npy", "--json") == 0
    assert strict(capsys.readouterr().out)["mean"][1] == "NaN"


def test_images(folder, capsys):
    for number in range(3):
        save_image(folder / f"{number}.png", "RGB", (3 + number, 4))
    save_image(folder / "grey.png", "L")
    (folder / "broken.png").write_bytes(b"x")
    (folder / "broken.tif").write_bytes(b"x")
    assert fastbn_("stats", folder) == 2
    assert "broken.png" in capsys.readouterr().err
    assert fastbn_("stats", folder, "--skip-bad", "--json") == 0
    out, err = capsys.readouterr()
    found = strict(out)
    assert (found["layout"], found["count"]) == ("NHWC", [48, 48, 48])
    assert [entry["name"] for entry in found["inputs"]] == [
        str(folder / f"{n}.png") for n in range(3)
    ]
    assert "3 images left out" in err
    (folder / "broken.png").unlink()
    (folder / "broken.tif").unlink()
    assert fastbn_("stats", folder) == 2
    assert "grey.png" in capsys.readouterr().err
    assert fastbn_("stats", folder, "--mode", "RGB") == 0


def test_deviations_of_images_and_pixels(folder, capsys):
    image = pytest.importorskip("PIL.Image")
    for value in 10, 200:
        x = np.clip(value + RNG.integers(-5, 6, (4, 4, 3)), 0, 255).astype(np.uint8)
        image.fromarray(x).save(f"{value}.png")
    assert fastbn_("stats", folder) == 0
    assert "more than 1% from the deviation of the pixels" in capsys.readouterr().err


def test_compare(folder, capsys):
    np.save("x.npy", X)
    stats = fastbn.batch_stats(X, layout="NHWC")
    mean, std = stats.mean / 255, stats.std() / 255

    def compare(mean, std, *more):
        (folder / "p.json").write_text(json.dumps({"mean": list(mean), "std": list(std)}))
        arguments = "stats", "x.npy", "--layout", "NHWC", "--max-value", 255, "--compare", "p.json"
        return fastbn_(*arguments, *more)

    assert compare(mean, std) == 0
    assert compare(mean + 0.9e-3 * std, std * 1.0009) == 0
    assert compare(mean + 1.1e-3 * std, std) == 1
    assert compare(mean, std * 1.0011) == 1
    assert compare(mean, std * 1.0011, "--tolerance", "2e-3") == 0
    assert compare(mean[:2], std[:2]) == 2
    assert "p.json: expected 3 channels, got 2" in capsys.readouterr().err
    assert fastbn_("stats", "x.npy", "--layout", "NHWC", "-o", "s.json") == 0
    for value in 1, 255:
        assert fastbn_("merge", "s.json", "--compare", "s.json", "--max-value", value) == 0


def test_merge_refuses(folder, capsys):
    np.save("x.npy", X)
    np.save("y.npy", X[..., :2])
    fastbn_("stats", "x.npy", "--layout", "NHWC", "-o", "a.json")
    fastbn_("stats", "y.npy", "--layout", "NHWC", "-o", "channels.json")
    fastbn_("stats", "x.npy", "--layout", "NHCW", "-o", "layout.json")
    good = (folder / "a.json").read_text()
    (folder / "schema.json").write_text(good.replace('"schema": 1', '"schema": 2'))
    (folder / "published.json").write_text('{"mean": [1], "std": [1]}')
    (folder / "list.json").write_text("[]")
    (folder / "nan.json").write_text(good.replace('"mean": [', '"mean": [NaN, '))
    (folder / "torn.json").write_text(good[:50])
    (folder / "keys.json").write_text('{"schema": 1}')
    capsys.readouterr()
    for name in (
        "channels",
        "layout",
        "schema",
        "published",
        "list",
        "nan",
        "torn",
        "keys",
        "missing",
    ):
        assert fastbn_("merge", "a.json", f"{name}.json", "-o", "all.json") == 2
        assert f"{name}.json" in capsys.readouterr().err
    assert not (folder / "all.json").exists()


def test_normalize(folder):
    np.save("x.npy", X)
    fastbn_("stats", "x.npy", "--layout", "NHWC", "-o", "s.json")
    layouts = "--layout", "NHWC", "--out-layout", "NCHW"
    assert fastbn_("normalize", "x.npy", "y.npy", "--stats", "s.json", *layouts, "--jobs", 2) == 0
    stats = data.stats(X, layout="NHWC")
    expected = fastbn.normalize(X, stats.mean, stats.std(), layout="NHWC", out_layout="NCHW")
    np.testing.assert_array_equal(np.load("y.npy"), expected)
    assert fastbn_("normalize", "x.npy", "y.npy", "--stats", "s.json", *layouts) == 2


@pytest.mark.parametrize("arguments", [
    [], ["stats"], ["stats", "missing.npy"], ["stats", "x.txt"], ["what"],
    ["stats", "x.npy", "--shard", "2/2"],
    ["stats", "x.npy", "--jobs", "0"], ["stats", "x.npy", "--layout", "CC"],
    ["stats", "x.npy", "--nodata", "z"],
    ["merge", "x.npy"], ["normalize", "x.npy", "y.npy"], ["stats", "x.npy", "-o", "no/where.json"],
    ["normalize", "x.npy", "y.npy", "--stats", "x.npy"], ["stats", "x.npy", "--tolerance", "-1"],
])  # fmt: skip
def test_mistakes(folder, capsys, arguments):
    np.save("x.npy", X)
    (folder / "x.txt").write_text("text")
    assert fastbn_(*arguments) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert err
    assert sorted(path.name for path in folder.iterdir()) == ["x.npy", "x.txt"]


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
def test_interrupted(folder):
    with (folder / "x.npy").open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (1 << 36, 1)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + (1 << 36))
    (folder / "p.json").write_text('{"mean": [0], "std": [1]}')
    for command in (
        ["stats", "x.npy", "-o", "s.json"],
        ["normalize", "x.npy", "y.npy", "--stats", "p.json"],
    ):
        # A job in the background of a shell ignores the signal, and so would its children.
        process = subprocess.Popen(
            [sys.executable, "-m", "fastbn", *command], stderr=subprocess.PIPE, text=True,
            env=os.environ, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        try:
            time.sleep(2.0)  # while it imports, Python answers the signal
            journal = folder / "y.npy.partial" / "journal"
            while command[0] == "normalize" and not journal.exists():
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=30)
        finally:
            process.kill()
            process.wait()
        assert process.returncode == 130
        assert "Traceback" not in err
        assert ("--resume" in err) == (command[0] == "normalize")
    assert not list(folder.glob("s.json*"))
    assert (folder / "y.npy.partial").exists()
    assert not (folder / "y.npy").exists()


def test_the_module_is_the_command(folder):
    np.save("x.npy", X)
    command = [sys.executable, "-m", "fastbn"]
    printed = subprocess.run([*command, "stats", "x.npy", "--layout", "NHWC"], check=True,
                             capture_output=True, text=True)  # fmt: skip
    assert printed.stdout.split()[:4] == ["channel", "count", "mean", "std"]
    assert printed.stderr == ""
    assert (
        subprocess.run([*command, "stats", "no.npy"], check=False, capture_output=True).returncode
        == 2
    )

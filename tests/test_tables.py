# SPDX-License-Identifier: BSD-3-Clause
"""The tables of the documents are those of the committed measurements. Measures nothing."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TABLES = ROOT / "docs" / "tables"
MEASUREMENTS = TABLES / "measurements"

pytestmark = pytest.mark.skipif(
    not ((ROOT / "benchmarks").exists() and MEASUREMENTS.exists()), reason="not the repository"
)


@pytest.fixture
def modules(monkeypatch):
    pytest.importorskip("ml_dtypes")
    monkeypatch.syspath_prepend(str(ROOT))
    names = ("benchmarks.cases", "benchmarks.report", "benchmarks.results")
    return [importlib.import_module(name) for name in names]


def test_pages_are_those_of_the_measurements(modules):
    # After a new measurement: python -m benchmarks --tables docs/tables
    _, report, _ = modules
    assert report.documented(TABLES) == {page: page.read_text() for page in TABLES.glob("*.md")}


@pytest.mark.parametrize(
    ("page", "name"),
    [("performance", "batch-norm-float32"), ("family", "other-norms-float32")],
)
def test_the_summary_of_a_page_is_that_of_the_measurement(modules, page, name):
    _, report, results = modules
    summary = report.size_table(results.read(MEASUREMENTS / f"{name}.json"))
    assert summary in (ROOT / "docs" / f"{page}.md").read_text()


def test_measurements_are_small():
    assert 0 < sum(file.stat().st_size for file in MEASUREMENTS.iterdir()) < 300_000


@pytest.fixture
def found(modules):
    cases, _, results = modules
    found = results.Results({"date": "2026-01-01"}, "python -m benchmarks")
    kinds = {"fastbn v4": "fastbn", "fastbn, new array": "fastbn new", "PyTorch": "peer",
             "JAX": "peer"}  # fmt: skip
    times = {1: (1.0, 1.5, 3.0, 2.0), 2: (1.25, 2.0, 1.0, 1.125)}
    for threads, ratios in times.items():
        case = cases.Case("batch", "", (8, 64, 56, 56), "NCHW", "training", "float32", threads)
        named = dict(zip(kinds, ratios, strict=True))
        found.add(results.Outcome(case, 1e-3 / threads, named, kinds))
    found.add_error(("batch", "float32", "training", "fastbn"), 1e-7)
    return found


def test_a_file_keeps_what_a_run_has_found(modules, found, tmp_path):
    _, _, results = modules
    results.write(found, tmp_path / "results.json")
    assert results.read(tmp_path / "results.json") == found


def test_figures(modules, found):
    _, report, _ = modules
    # 2 / 1 with one thread, 1 / 1.25 with two; of two numbers the geometric mean.
    assert "| the fastest peer | 1.26 | 0.80 | 2.0 | 2 | 1 |" in report.peer_table(found)
    # Against a PyTorch that makes a new tensor, fastbn makes a new array: 3 / 1.5, 1 / 2.
    assert "| PyTorch, as called | 1.00 | 0.50 | 2.0 | 2 | 1 |" in report.peer_table(found)
    assert report.size_table(found).splitlines()[-1] == (
        "| planes, 512 KB to 16 MB | 1.00 / 2.00 | 1.25 / 0.80 |"
    )
    # 1 ms against 1.25 * 0.5 ms.
    assert "| 512 KB to 16 MB | 1.60 (1.60 at least) |" in report.thread_table(found)
    assert "| NCHW | 2 | 8x64x56x56 | training | 1.25 / 1.00 PyTorch |" in report.lost_table(found)
    assert "**1.25 / 1.00 PyTorch**" in report.case_tables(found)


def test_an_error_that_is_no_number_is_the_largest(found):
    key = ("batch", "float32", "training", "fastbn")
    for error in (float("nan"), 1.0):
        found.add_error(key, error)
    assert found.errors[key] != found.errors[key]

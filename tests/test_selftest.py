# SPDX-License-Identifier: BSD-3-Clause
"""`python -m fastbn --selftest`: what is published holds here, and a difference is told."""

import numpy as np
import pytest
from arrays import DTYPES
from processes import run

import fastbn
from fastbn import _digests, _dispatch, _selftest


def test_results_are_as_published(capsys):
    assert _selftest.main()
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith(" ok") for line in lines) == len(_selftest.OPERATIONS) * len(
        _selftest.dtypes()
    )
    assert "DIFFERS" not in "".join(lines)


def test_every_norm_has_published_digests():
    tested = {name.split()[0] for name in _selftest.OPERATIONS} - {"integers", "normalize"}
    public = {name for name in fastbn.__all__ if name.endswith("_norm")} - {"fold_batch_norm"}
    assert tested == {name.removesuffix("_norm") for name in public}
    assert set(_digests.DIGESTS) == set(_selftest.DIGITS) == set(DTYPES)
    for dtype in DTYPES:
        assert list(_digests.DIGESTS[dtype]) == list(_selftest.OPERATIONS)


def test_one_wrong_bit_is_a_difference(monkeypatch, capsys):
    def wrong(batch):
        y = fastbn.batch_norm(batch.x, *batch.running(), batch.weight, batch.bias,
                              layout=batch.layout)  # fmt: skip
        if _dispatch.show_config()["isa"] == _dispatch.runnable()[-1]:
            y.reshape(-1).view(f"u{y.itemsize}")[-1] ^= 1
        return [y]

    monkeypatch.setitem(_selftest.OPERATIONS, "batch inference", wrong)
    assert not _selftest.main()
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.endswith(" DIFFERS") for line in lines) == len(_selftest.dtypes())
    told = [line for line in lines if line.startswith("    ")]
    assert len(told) == 2 * len(_selftest.dtypes())
    assert all(line.split(",")[0].strip() == _dispatch.runnable()[-1] for line in told)
    assert any(line.startswith("NOT as published") for line in lines)


SELFTEST = """
import runpy, sys
sys.modules["ml_dtypes"] = None
from fastbn import _digests
sys.argv[1:] = ["--selftest"]
if {spoil}:
    _digests.DIGESTS["float32"]["rms forward"] = "0"
runpy.run_module("fastbn", run_name="__main__", alter_sys=True)
"""


def test_the_exit_status_tells():
    with pytest.raises(RuntimeError):
        run(SELFTEST.format(spoil=True))


def test_without_ml_dtypes_bfloat16_is_skipped():
    *_, published, note = run(SELFTEST.format(spoil=False)).splitlines()
    assert published.startswith("as published")
    assert note == "without bfloat16: ml_dtypes is not installed"


def test_inputs_are_exact_and_of_integers(any_dtype):
    exact = _selftest.numbers((997,), "float64", 7)
    x = _selftest.numbers((997,), any_dtype, 7)
    # Fewer digits of the same integers: at most one unit in the last place below.
    usual = np.arange(997) % 97 != 0
    below = exact[usual] - x[usual].astype(np.float64)
    assert (below >= 0).all()
    assert (below < 2.0 ** (2 - _selftest.DIGITS[any_dtype])).all()
    assert exact[usual].min() < -0.99
    assert 2.99 < exact[usual].max() < 3

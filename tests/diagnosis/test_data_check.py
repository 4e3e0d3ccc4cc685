"""Samples that are unlike the others of a data set are told, in one pass and with few numbers kept of each."""

from __future__ import annotations

from dataclasses import replace
from math import inf, nan
from typing import Any

import numpy as np
import pytest
import torch

from lightning_nanguard.diagnosis.data_check import Collated, DataCheck, Unreadable
from lightning_nanguard.measure.sample_parts import sample_hash
from lightning_nanguard.record.bad_samples import BadSample
from lightning_nanguard.thresholds.samples import SamplesThresholds


def checked(samples: list[Any], **options: Any) -> list[tuple[Any, str, dict[str, Any]]]:
    check = DataCheck(**options)
    for row, sample in enumerate(samples):
        check.see(BadSample("", row), sample)
    assert check.count == len(samples)
    return [(one.row, one.cause, dict(one.columns)) for one in check.found()]


def usual(count: int = 20) -> list[Any]:
    source = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(4, generator=source), "y": float(row + 1)} for row in range(count)]


def test_healthy_data() -> None:
    """Nothing is found in samples that are alike."""
    assert checked(usual()) == []
    assert DataCheck().found() == []


def test_what_is_unlike() -> None:
    """Not finite, out of range, of another shape or dtype, without a field, or not to be read."""
    made = usual()
    made[2]["x"][3] = nan
    made[4]["y"] = -inf
    made[6]["x"] = made[6]["x"] * 1e6
    made[8]["x"] = torch.zeros(5)
    made[9]["y"] = 7
    made[10] = {"x": made[10]["x"], "z": 1.0}
    made[11] = Unreadable("OSError: broken")
    found = checked(made, thresholds=replace(SamplesThresholds(), usual_share=0.7))
    assert found[:3] == [
        (2, "not finite", {"x": (3,)}),
        (4, "not finite", {"y": ()}),
        (11, "cannot be read: OSError: broken", {}),
    ]
    assert found[3:6] == [
        (8, "field x is (5,) float32, usually (4,) float32", {}),
        (9, "field y is () int64, usually () float64", {}),
        (10, "field y is missing; field z is new", {}),
    ]
    ((row, cause, columns),) = found[6:]
    assert (row, columns) == (6, {"x": ()})
    assert cause.startswith("reaches ")


def test_factor_and_varied_shapes() -> None:
    """The factor can be chosen; where sizes differ by nature, none is called unusual."""
    made = [np.full(4, 1.0 + row, dtype=np.float32) for row in range(10)]
    assert [row for row, _, _ in checked(made, factor=1.5)] == [9]
    check = DataCheck()
    for row in range(10):
        check.see(BadSample("", row), torch.zeros(row + 1))
    assert check.shapes_vary()
    assert check.found() == []


def test_samples_without_rows_have_hashes() -> None:
    """A sample of a stream can be found again by its hash; one that is collated already is taken as it is."""
    check, bad = DataCheck(), torch.tensor([1.0, nan])
    check.see(BadSample("", batch=3, index=1), bad)
    check.see(BadSample("", batch=3, index=2), Collated(bad[None]))
    assert [(one.hash, one.batch, one.index) for one in check.found()] == [
        (sample_hash(bad), 3, 1),
        (sample_hash(bad), 3, 2),
    ]


@pytest.mark.parametrize("sample", ["words", None, object(), {"x": "words"}])
def test_samples_without_numbers(sample: Any) -> None:
    """What holds no tensor is no error."""
    assert checked([sample] * 3) == []

"""What a batch shows by itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from lightning_nanguard import BadField
from lightning_nanguard.diagnosis.batch import batch_clues, samples, target_fields, tensor_fields
from lightning_nanguard.thresholds.diagnosis import DataThresholds

NAN = math.nan


def test_bad_values_are_told_by_field_sample_and_column() -> None:
    """NaN and Inf are found in nested batches; columns are told unless all are concerned."""
    image, label = torch.zeros(4, 3), torch.zeros(4)
    image[2, 1] = NAN
    label[3] = math.inf
    clues = batch_clues({"image": image, "more": [label, torch.tensor(NAN)]}, nn.Identity())
    assert clues.bad_fields == (BadField("image", (2,), (1,)), BadField("more.0", (3,)), BadField("more.1", ()))
    assert batch_clues((torch.full((2, 2), NAN), torch.zeros(2)), nn.Identity()).bad_fields == (BadField("0", (0, 1)),)


def test_ranges_are_of_finite_numbers() -> None:
    """The floating input of the largest magnitude, and the target, with their outliers."""
    x, y = torch.tensor([[1.0], [-2.0], [3e4], [NAN]]), torch.tensor([0, 1, 2, 3])
    clues = batch_clues((x, x / 1e6, y), nn.Sequential(nn.BatchNorm1d(1)))
    assert clues.inputs is not None
    assert clues.target is not None
    assert (clues.inputs.field, clues.inputs.lowest, clues.inputs.highest) == ("0", -2.0, 3e4)
    assert clues.inputs.outliers == (2,)
    assert (clues.target.field, clues.target.dtype, clues.target.highest) == ("2", "int64", 3.0)
    assert clues.normalises
    few = batch_clues((x, y), nn.Identity(), DataThresholds(outlier_factor=1e5))
    assert few.inputs is not None
    assert few.inputs.outliers == ()
    assert not few.normalises


@pytest.mark.parametrize(
    ("batch", "fields", "targets", "count"),
    [
        (torch.zeros(5), ["0"], [], 5),
        ((torch.zeros(5), torch.ones(5)), ["0", "1"], ["1"], 5),
        ({"x": torch.zeros(3), "Label": torch.ones(3), "id": "a"}, ["x", "Label"], ["Label"], 3),
        ([torch.zeros(2), {"a": torch.zeros(2), "b": torch.zeros(2)}], ["0", "1.a", "1.b"], ["1.a", "1.b"], 2),
        (torch.tensor(1.0), ["0"], [], None),
        ("nothing", [], [], None),
    ],
)
def test_fields_targets_and_samples(batch: Any, fields: list[str], targets: list[str], count: int | None) -> None:
    """Tensors by their path; the target is the last of several items, or what a mapping calls so."""
    found = dict(tensor_fields(batch))
    assert list(found) == fields
    assert target_fields(batch, found) == targets
    assert samples(batch) == count

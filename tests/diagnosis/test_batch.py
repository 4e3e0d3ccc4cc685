"""What a batch shows by itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from lightning_nanguard import BadField
from lightning_nanguard.diagnosis.batch import batch_clues, compared, samples, target_fields, tensor_fields
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


def test_two_samples_in_two_fields_are_told_apart() -> None:
    """A batch of two samples with two fields: the innermost list counts, and fields are no samples."""
    net, bad, good = nn.Identity(), torch.full((3, 2, 2), NAN), torch.zeros(3, 2, 2)
    for batch, field in (
        (([good, bad], torch.zeros(2)), BadField("0.1", (1,))),
        ((good[:, :, 0], torch.tensor([0.0, NAN])), BadField("1", (1,))),
        ((torch.stack([good[:, 0], bad[:, 0]], 1), torch.zeros(2)), BadField("0", (1,))),
        ((bad[:, 0, :1], torch.zeros(2)), BadField("0", ())),
        ([(good, torch.zeros(1)), (bad, torch.zeros(1))], BadField("1.0", (1,))),
    ):
        assert batch_clues(batch, net, count=2).bad_fields == (field,), field
    images = ([torch.zeros(3, 2, 2), torch.full((3, 2, 2), NAN), torch.zeros(3, 2, 2)], torch.zeros(3))
    assert batch_clues(images, net, count=3).bad_fields == (BadField("0.1", ()),)  # samples or channels?


def test_samples_lie_along_the_axis_that_counts_them() -> None:
    """In a list of images the element is the sample, and with time first the second axis counts the samples. Parts
    that are joined, such as the nodes of graphs, name no sample."""
    net, image = nn.Identity(), torch.zeros(3, 2, 2)
    image[0, 1] = NAN
    images = [torch.zeros(3, 2, 2) for _ in range(4)]
    images[2] = image
    series, nodes = torch.zeros(5, 4, 2), torch.zeros(12, 2)
    series[:, 3, 1], nodes[7, 0] = NAN, NAN
    for batch, field in (
        ((images, torch.zeros(4)), BadField("0.2", (2,))),
        ({"x": series, "y": torch.zeros(4)}, BadField("x", (3,))),
        ({"x": nodes, "y": torch.zeros(4)}, BadField("x", ())),
        ((torch.tensor([0.0, NAN, 0.0, 0.0]), torch.zeros(4)), BadField("0", (1,))),
    ):
        assert batch_clues(batch, net, count=4).bad_fields == (field,)


@pytest.mark.parametrize("features", [3, 2])
def test_a_field_may_hold_the_sample_of_each_row(features: int) -> None:
    """As in batches of torch_geometric, whose rows are the nodes of all graphs. That there are as many features as
    graphs misleads nobody."""
    x = torch.zeros(5, features)
    x[4, 0] = math.nan
    graphs = {"x": x, "y": torch.zeros(2), "batch": torch.tensor([0, 0, 0, 1, 1])}
    assert batch_clues(graphs, nn.Linear(1, 1), count=2).bad_fields == (BadField("x", (1,), (0,)),)


def test_ranges_are_compared_with_the_batches_before() -> None:
    """Each field with the same field, by its largest number; a field that they do not have is not compared."""
    before = [(torch.full((4, 2), value), torch.tensor([1.0, -5.0])) for value in (2.0, 3.0)]
    clues = batch_clues((torch.full((4, 2), 900.0), torch.tensor([7.0, 8.0])), nn.Linear(2, 1))
    (found,) = compared([clues], before)
    assert found.inputs is not None
    assert found.target is not None
    assert (found.inputs.before, found.target.before) == (3.0, 5.0)
    assert compared([clues], [{"x": torch.ones(2)}])[0].inputs == clues.inputs
    assert compared([batch_clues("words", nn.Linear(2, 1))], before)[0].inputs is None

"""The thresholds of detection are frozen numbers, each explained."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, fields, is_dataclass
from typing import Any

import pytest

from lightning_nanguard import DivergingLoss
from lightning_nanguard.thresholds.detection import DetectionThresholds, DivergingLossThresholds


def parts(whole: Any) -> Iterator[Any]:
    """A dataclass and all in it."""
    yield whole
    for one in fields(whole):
        value = getattr(whole, one.name)
        if is_dataclass(value):
            yield from parts(value)


@pytest.mark.parametrize("part", [*parts(DetectionThresholds())], ids=lambda part: type(part).__name__)
def test_each_number_is_explained(part: Any) -> None:
    """Every field has a line in ``Attributes:``, in the same order, and cannot be set."""
    explained = re.findall(r"^\s+(\w+): ", (type(part).__doc__ or "").partition("Attributes:")[2], re.MULTILINE)
    assert explained == [one.name for one in fields(part)]
    for one in fields(part):
        with pytest.raises(FrozenInstanceError, match=one.name):
            setattr(part, one.name, 0)


def test_one_number_can_be_set_from_yaml() -> None:
    """The others keep their defaults."""
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(DivergingLoss, "detector")
    config = parser.parse_string("detector: {patience: 50, thresholds: {readings: 20}}")
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    detector = instantiate(config).detector
    assert detector.patience == 50
    assert detector.thresholds == DivergingLossThresholds(readings=20)

"""Numbers and samples in words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_nanguard import Origin
from lightning_nanguard.diagnosis.case import Range
from lightning_nanguard.diagnosis.rules.phrases import (
    finding_at,
    listed,
    of_samples,
    outlier_finding,
    smallest_operand,
    target_span,
)
from tests.diagnosis.rules.faults import FAR


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((), ""),
        ((3,), "sample 3"),
        ((3, 17), "samples 3 and 17"),
        ((1, 2, 3), "samples 1, 2 and 3"),
        (tuple(range(1010)), "samples 0, 1, 2, 3, 4, 5, 6, 7 and 1,002 more"),
    ],
)
def test_numbers_are_listed(numbers: tuple[int, ...], said: str) -> None:
    """Up to eight are named, of more how many there are."""
    assert listed("sample", numbers) == said
    assert of_samples(numbers) == (f" of {said}" if said else "")


def test_an_operation_is_told_with_its_place() -> None:
    """The finding has the place, the samples and the numbers of the operation."""
    origin = Origin("log", "head", "model.py:12", samples=(4,), lowest=-0.5, highest=2.0)
    finding = finding_at("log_of_zero", 0.85, origin, "Look.")
    assert finding.place == "head (log, model.py:12)"
    assert finding.samples == (4,)
    assert finding.evidence["lowest"] == -0.5
    assert smallest_operand(origin) == "-0.5"
    assert smallest_operand(Origin("log", lowest=0.0, smallest=0.0)) == "zero"
    assert target_span(FAR, origin) == "targets run from 0 to 1e+20"


def test_a_far_number_has_its_sign_and_is_compared_by_magnitude() -> None:
    """The number itself is told, and what the others are: the median over the samples, and the batches before."""
    far = Range("1", "float32", -1e6, 3.0, -3e4, 1e5, outliers=(29,), usual=1.7, before=3.2)
    assert outlier_finding("target_out_of_domain", 0.9, far, "Clip.").suggestion == (
        "field 1 reaches -1e+06 in sample 29 of this batch, and no more than 1.7 in magnitude in half of its samples. "
        "Clip."
    )
    assert outlier_finding("target_out_of_domain", 0.9, replace(far, outliers=()), "Clip.").suggestion == (
        "field 1 reaches -1e+06 in this batch, and at most 3.2 in magnitude in the batches before: it may be in other "
        "units. Clip."
    )

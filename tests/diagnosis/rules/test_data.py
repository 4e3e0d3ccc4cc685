"""Causes that lie in the data."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from lightning_nanguard import BadField, Case, Clues, Course, Evidence, Fault, LabelRelation, Origin, Range
from lightning_nanguard.diagnosis.case import NO_FAULT
from lightning_nanguard.diagnosis.rule_set import RuleSet
from lightning_nanguard.thresholds.diagnosis import DEFAULT
from tests.diagnosis.rules.faults import (
    EXPLODING,
    FAR,
    LOG,
    LOSS,
    NORMAL,
    PIXELS,
    SPIKE,
    WORSE,
    Row,
    rules_of,
    surest_cause,
)

MISSING = Range("1", "float32", -100.0, -100.0, -100.0, 0.0)
BAD_TARGET = Origin("log1p", lowest=-3.0, highest=1.0, from_weights=False, from_target=True)

ZERO = Origin("div", lowest=0.0, highest=0.0, smallest=0.0, from_weights=False)
NOTHING = Origin("mean", empty=True, from_target=True)

OTHER_UNITS = Range("0", "float32", -3e3, 3e3, 0.0, 1e3, before=3.0)
"""A thousand times as large as in the batches before."""

ROWS: list[Row] = [
    ("unnormalised_input", SPIKE, {}, Clues(inputs=OTHER_UNITS)),
    ("target_out_of_domain", SPIKE, {}, Clues(target=OTHER_UNITS)),
    ("unexplained", LOSS, {}, Clues(inputs=NORMAL)),
    ("non_finite_input", LOSS, {"batch_finite": False}, Clues()),
    ("non_finite_input", LOSS, {}, Clues(bad_fields=(BadField("0", (3, 17), (3, 4)),))),
    ("log_of_zero", LOSS, {"batch_finite": False}, Clues(bad_fields=(BadField("0", (3,)),), origin=LOG)),
    (
        "target_out_of_domain",
        LOSS,
        {},
        Clues(origin=BAD_TARGET),
    ),
    ("no_valid_target", LOSS, {}, Clues(origin=Origin("nll_loss_forward"))),
    ("unknown_operation", LOSS, {}, Clues(origin=Origin("nll_loss_forward"), replayed=True, loss=float("inf"))),
    ("no_valid_target", LOSS, {}, Clues(origin=replace(NOTHING, from_mask=True), target=MISSING)),
    # A mask that is drawn at random; a denominator that is drawn is no mask.
    ("no_valid_target", LOSS, {}, Clues(origin=Origin("mean", empty=True), gone_otherwise=True)),
    ("no_valid_target", LOSS, {}, Clues(origin=Origin("mse_loss", empty=True, from_mask=True), gone_otherwise=True)),
    ("no_valid_target", LOSS, {}, Clues(origin=Origin("nll_loss_forward"), gone_otherwise=True)),
    ("no_valid_target", LOSS, {}, Clues(origin=replace(ZERO, from_mask=True), gone_otherwise=True)),
    ("no_valid_target", LOSS, {}, Clues(origin=replace(ZERO, made_by="sum"), gone_otherwise=True)),
    ("random_draw", LOSS, {}, Clues(origin=ZERO, gone_otherwise=True)),
    ("division_by_zero", LOSS, {}, Clues(origin=replace(ZERO, made_by="sum"), gone_otherwise=False)),
    # Targets that are all the same, divided by their deviation: nothing selects among them.
    ("division_by_zero", LOSS, {}, Clues(origin=NOTHING, target=MISSING)),
    ("non_finite_from_start", LOSS, {}, Clues(origin=Origin("nll_loss_forward", given="weight"))),
    ("non_finite_input", LOSS, {}, Clues(bad_fields=(BadField("0", (3,)),), origin=None, gradient_finite=False)),
    ("labels_unrelated", NO_FAULT, {}, Clues(labels=LabelRelation(1200, 0.11, 0.1, False))),
    (None, NO_FAULT, {}, Clues(labels=LabelRelation(1200, 0.3, 0.1, True))),
    ("division_by_zero", LOSS, {}, Clues(origin=Origin("mean", empty=True, from_target=True), target=NORMAL)),
    ("target_out_of_domain", SPIKE, {}, Clues(target=FAR)),
    ("unnormalised_input", EXPLODING, {"comparison": WORSE}, Clues(inputs=PIXELS)),
    ("learning_rate_too_high", EXPLODING, {"comparison": WORSE}, Clues(inputs=PIXELS, normalises=True)),
]


@pytest.mark.parametrize(("cause", "fault", "known", "clues"), ROWS)
def test_the_surest_cause(cause: str | None, fault: Fault, known: dict[str, Any], clues: Clues) -> None:
    """Of all rules the one that fits is the surest, and none says anything where nothing is wrong."""
    assert surest_cause(fault, known, clues) == cause


def test_every_rule_has_a_row() -> None:
    """A rule is called as the cause it finds, and each has a row."""
    assert rules_of("data") <= {row[0] for row in ROWS}


def test_samples_and_columns_are_named() -> None:
    """What holds NaN is named by sample, field and column."""
    finding = RuleSet().diagnose(Case(LOSS, Evidence(step=9), Clues(bad_fields=(BadField("0", (3, 17), (3, 4)),))))
    assert finding is not None
    assert "samples 3 and 17 of this batch hold NaN or Inf in field 0, columns 3 and 4" in finding.suggestion


@pytest.mark.parametrize(("infinite", "sure"), [(True, True), (False, False)])
def test_infinite_inputs_reach_a_product(infinite: bool, sure: bool) -> None:
    """If a product made NaN of an infinite number of the batch, the batch is no guess."""
    origin = Origin("addmm", infinite=infinite)
    clues = Clues(bad_fields=(BadField("0", (3,)),), origin=origin, loss=math.nan, replayed=True)
    found = next(
        one for one in RuleSet().findings(Case(LOSS, Evidence(step=9), clues)) if one.cause == "non_finite_input"
    )
    assert (found.confidence > DEFAULT.confidence.told) is sure


def test_missing_values_that_only_the_loss_leaves_out() -> None:
    """Where the loss is finite and its gradient is not, the batch is not to be cleaned but filled in beforehand."""
    missing = Clues(bad_fields=(BadField("1", (3,)),), replayed=True, loss=0.5, gradient_finite=False)
    origin = Origin("mul", backward=True)
    for clues, words in ((missing, "nan_to_num"), (replace(missing, loss=None), "Clean the data")):
        finding = RuleSet().diagnose(Case(LOSS, Evidence(step=9), replace(clues, origin=origin)))
        assert finding is not None
        assert (finding.cause, words in finding.suggestion) == ("non_finite_input", True)


def test_large_inputs_of_a_loss_that_does_not_move() -> None:
    """They are blamed where most of the untrained model's loss is still there, and only guessed at where it moves."""
    course = Course(updates=96, first=2.3, before=2.3, now=2.3, spread=0.01, norm=1.0)
    for now, confidence in ((2.3, 0.94), (0.2, 0.5)):
        case = Case(NO_FAULT, clues=Clues(inputs=PIXELS), course=replace(course, now=now))
        finding = RuleSet().diagnose(case)
        assert finding is not None
        assert (finding.cause, finding.confidence) == ("unnormalised_input", confidence)


@pytest.mark.parametrize(("empty", "said"), [(False, "is ignored or has a weight of zero"), (True, "selects nothing")])
def test_why_no_target_is_valid(empty: bool, said: str) -> None:
    """All targets may be ignored, or there may be none at all."""
    clues = Clues(replayed=True, origin=Origin("nll_loss_forward", empty=empty))
    finding = RuleSet().diagnose(Case(LOSS, Evidence(step=9), clues))
    assert finding is not None
    assert finding.cause == "no_valid_target"
    assert said in finding.suggestion

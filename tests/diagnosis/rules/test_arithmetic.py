"""Causes that lie in an operation."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_nanguard import Case, Clues, Comparison, Evidence, Fault, Origin
from lightning_nanguard.diagnosis.case import BadField
from lightning_nanguard.diagnosis.rule_set import RuleSet
from tests.diagnosis.rules.faults import EXP, GRADIENT, LOG, LOSS, SAME, SCALER, Row, rules_of, surest_cause

FAR_POWER = Origin("pow", lowest=-1e30, exponent=2.0, from_weights=False, from_target=True)

HALF_PRODUCT = Origin("addmm", backward=True, dtype="float16")

ROWS: list[Row] = [
    ("unexplained", LOSS, {}, Clues()),
    (None, LOSS, {}, Clues(replayed=True, loss=1.0, gradient_finite=True)),
    ("log_of_zero", LOSS, {}, Clues(origin=Origin("log", lowest=-0.5))),
    ("log_of_zero", LOSS, {}, Clues(origin=Origin("log", from_weights=True, from_target=True))),
    ("log_of_zero", GRADIENT, {}, Clues(origin=Origin("log", backward=True), gradient_finite=False)),
    (
        "log_of_zero",
        GRADIENT,
        {"comparison": Comparison(9.0, 1.0, then_finite=False), "climbing": True},
        Clues(origin=Origin("log", backward=True), gradient_finite=False),
    ),
    # A good model that an operation does not hold.
    (
        "log_of_zero",
        GRADIENT,
        {"growth": 9.0, "first": 2.3, "loss_unit": 2.3, "comparison": Comparison(0.37, 0.13, then_finite=True)},
        Clues(replayed=True, origin=LOG),
    ),
    ("exp_overflow", LOSS, {}, Clues(origin=EXP)),
    ("exp_overflow", LOSS, {"comparison": SAME}, Clues(origin=EXP)),
    ("exp_overflow", LOSS, {}, Clues(origin=Origin("exp", dtype="float16"), finite_in_float32=False)),
    ("division_by_zero", LOSS, {}, Clues(origin=Origin("div", smallest=0.0))),
    ("unknown_operation", LOSS, {}, Clues(origin=Origin("div", smallest=0.5))),
    ("division_by_zero", LOSS, {}, Clues(origin=Origin("pow", smallest=0.0, exponent=-1.0))),
    ("unknown_operation", LOSS, {}, Clues(origin=Origin("pow", smallest=0.0, exponent=2.0))),
    (
        "unknown_operation",
        LOSS,
        {},
        Clues(origin=FAR_POWER),
    ),
    ("division_by_zero", LOSS, {}, Clues(origin=Origin("mean", empty=True))),
    ("division_by_zero", LOSS, {}, Clues(origin=Origin("mse_loss", empty=True, from_mask=True))),
    # Labels that are missing are usual there; in this batch none is left.
    (
        "division_by_zero",
        LOSS,
        {},
        Clues(origin=Origin("mse_loss", empty=True, from_mask=True), bad_fields=(BadField("1", (0,), ()),)),
    ),
    ("division_by_zero", LOSS, {}, Clues(origin=Origin("std"))),
    ("sqrt_at_zero", GRADIENT, {}, Clues(origin=Origin("sqrt", backward=True), gradient_finite=False)),
    ("low_precision_overflow", LOSS, {}, Clues(origin=Origin("exp", dtype="float16"), finite_in_float32=True)),
    ("low_precision_overflow", SCALER, {}, Clues()),
    # Weights in float16: a gradient that float32 holds, and one that it does not hold either.
    ("low_precision_overflow", GRADIENT, {}, Clues(origin=HALF_PRODUCT, gradient_finite=False, gradient_fits=True)),
    ("exploding_gradient", GRADIENT, {}, Clues(origin=HALF_PRODUCT, gradient_finite=False, gradient_fits=False)),
    ("division_by_zero", LOSS, {}, Clues(origin=Origin("logsumexp", put_in=True))),
    ("random_draw", LOSS, {}, Clues(origin=LOG, gone_otherwise=True)),
    ("random_draw", LOSS, {}, Clues(gone_otherwise=True)),
    ("log_of_zero", LOSS, {}, Clues(origin=LOG, gone_otherwise=False)),
    ("non_finite_from_start", LOSS, {}, Clues(bad_buffers=("weight",))),
    # An observer begins with Inf, and is finite when it is used.
    ("division_by_zero", LOSS, {}, Clues(origin=Origin("div", smallest=0.0), bad_buffers=("least",))),
    ("non_finite_from_start", LOSS, {}, Clues(origin=Origin("mul", put_in=True), bad_buffers=("weight",))),
    ("corrupted_state", LOSS, {"corrupt": "buffer weight"}, Clues(bad_buffers=("weight",))),
]


@pytest.mark.parametrize(("cause", "fault", "known", "clues"), ROWS)
def test_the_surest_cause(cause: str | None, fault: Fault, known: dict[str, Any], clues: Clues) -> None:
    """Of all rules the one that fits is the surest, and none says anything where nothing is wrong."""
    assert surest_cause(fault, known, clues) == cause


def test_every_rule_has_a_row() -> None:
    """A rule is called as the cause it finds, and each has a row."""
    assert rules_of("arithmetic") <= {row[0] for row in ROWS}


@pytest.mark.parametrize(
    ("origin", "said"),
    [
        (
            Origin("div", smallest=0.0, made_by="std"),
            "the denominator (the result of std) is as small as 0: add",
        ),
        (Origin("div", smallest=0.0, made_by="sum"), "keep it at 1 or above"),
        (Origin("div", smallest=0.0, samples=(3,), from_weights=False), "look at the data of sample 3"),
        (Origin("div", smallest=0.0), "or leave such samples out"),
        (Origin("acos", lowest=0.5, highest=1.0000001), "from 0.5 to 1.0000001, where it needs numbers between -1 and"),
        (Origin("atanh", lowest=0.5, highest=1.0), "from 0.5 to 1, where it needs numbers above -1 and below 1"),
        (Origin("pow", lowest=-0.3, highest=2.0, exponent=0.4), "Clamp its input"),
        (Origin("mul", put_in=True), "puts in NaN or Inf as a number"),
        (Origin("mul", lowest=1e30, highest=1e30), "larger than float32 can hold"),
        (Origin("nll_loss_forward", given="weight"), "weight of nll_loss_forward held NaN or Inf, and no operation"),
    ],
)
def test_the_advice_fits_what_the_operation_was_given(origin: Origin, said: str) -> None:
    """What made a denominator, a number outside by rounding alone, a value put in, a tensor bad before the step."""
    finding = RuleSet().diagnose(Case(LOSS, Evidence(step=9), Clues(replayed=True, origin=origin)))
    assert finding is not None
    assert said in finding.suggestion

"""Causes that lie in the learner: its gradients and its updates."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_nanguard import Case, Clues, Comparison, Curvature, Evidence, Fault, Finding, Origin
from lightning_nanguard.diagnosis.case import EarlierFinding
from lightning_nanguard.diagnosis.rule_set import RuleSet
from lightning_nanguard.types import Trial
from tests.diagnosis.rules.faults import (
    BACK,
    BY_HAND,
    CORRUPTED,
    EXP,
    EXPLODING,
    GRADIENT,
    LARGE,
    LOG,
    LOSS,
    MOMENT,
    MOVED,
    NAN,
    OVERFLOW,
    SPIKE,
    STUCK,
    WORSE,
    Row,
    rules_of,
    surest_cause,
)

GROWN = {"growth": 9.0, "first": 2.3, "loss_unit": 2.3}
RISEN, FAR_WORSE = Comparison(0.37, 0.13, then_finite=True), Comparison(30.0, 0.13, then_finite=True)


ROWS: list[Row] = [
    # The updates since the snapshot, made again, made it too large again.
    ("learning_rate_too_high", MOMENT, {"redo_failed": True, "lr": 0.5}, Clues()),
    ("learning_rate_too_high", MOMENT, {"redo_failed": True, "climbing": True, "lr": 0.5}, Clues()),
    (None, LOSS, {"corrupt": "parameter w", "undo": True}, Clues()),
    ("exp_overflow", LOSS, {}, Clues(change=MOVED, good_finite=False, origin=Origin("exp", highest=1e5))),
    (None, SPIKE, {"usual_norm": 1.0}, Clues(norm=1.5)),
    ("exploding_gradient", SPIKE, {"usual_norm": 1.0}, Clues(norm=1e9, norms=(("a", 1e9), ("b", 1.0)))),
    ("exploding_gradient", OVERFLOW, {}, Clues()),
    ("exploding_gradient", GRADIENT, {}, Clues(origin=Origin("mm", backward=True), gradient_finite=False)),
    ("learning_rate_too_high", LOSS, {"corrupt": "parameter w", "climbing": True}, Clues()),
    ("learning_rate_too_high", LOSS, {"comparison": WORSE, "climbing": True}, Clues(origin=EXP)),
    ("learning_rate_too_high", EXPLODING, {"comparison": WORSE}, Clues()),
    ("learning_rate_too_high", EXPLODING, {"growth": 5.0}, Clues()),
    (None, EXPLODING, {}, Clues()),
    ("learning_rate_too_high", STUCK, {"trial": Trial(1.2), "lr": 0.5}, Clues()),
    # A fault of a user's own kind is judged by its traits.
    ("learning_rate_too_high", Fault("mine", "learner", "loss", certain=False), {"trial": Trial(0.4)}, Clues()),
    (None, Fault("mine", "learner", "loss", certain=False), {}, Clues()),
    ("exploding_gradient", Fault("mine", "batch", "gradient", 1e9, clipping_helps=True), {}, Clues()),
    # A trial says whether the rate is too high, or the run was as good as a lower rate and has lost it.
    ("collapsed", STUCK, {"trial": Trial(0.6, "best", 0.25), "first": 2.3, "levels": (2.2, 0.4), "lr": 0.5}, Clues()),
    ("learning_rate_too_high", BACK, {"trial": Trial(0.6, "start", 0.25), "first": 2.3, "lr": 0.5}, Clues()),
    ("learning_rate_too_high", STUCK, {"trial": Trial(0.6, "best", 0.25), "rate_rose": True}, Clues()),
    ("learning_rate_too_high", STUCK, {"trial": Trial(0.6, "best", 0.25), "growth": 9.0}, Clues()),
    # A weight that grew as a whole.
    ("learning_rate_too_high", LARGE, {"growth": 1e5, "jump": "parameter w"}, Clues(moved_alone=False)),
    ("collapsed", BACK, {"first": 2.3, "levels": (0.4, 0.9), "lr": 0.5}, Clues()),
    # A ruined model of which an exponential overflows in the end, and a good one.
    ("exp_overflow", LOSS, {**GROWN, "comparison": WORSE}, Clues(replayed=True, origin=EXP)),
    ("learning_rate_too_high", LOSS, {**GROWN, "comparison": WORSE, "climbing": True}, Clues(origin=EXP)),
    ("learning_rate_too_high", LOSS, {**GROWN, "comparison": WORSE, "growth": 1e6}, Clues(origin=EXP)),
    ("learning_rate_too_high", GRADIENT, {**GROWN, "comparison": FAR_WORSE}, Clues(replayed=True, origin=LOG)),
    # One that was not looked for again, having been seen so often, is no matter of the rate either.
    ("unexplained", GRADIENT, {**GROWN, "comparison": RISEN}, Clues()),
    # Under manual optimization the cause follows the verdict: large weights early in the run, or bad updates in a row.
    ("learning_rate_too_high", OVERFLOW, {**BY_HAND, "healthy_steps": 7, "jump": "parameter w"}, Clues()),
    ("learning_rate_too_high", LOSS, {**BY_HAND, "healthy_steps": 7, "jump": "parameter w"}, Clues()),
    ("learning_rate_too_high", OVERFLOW, {**BY_HAND, "bad_in_a_row": 4}, Clues()),
    ("exploding_gradient", OVERFLOW, BY_HAND, Clues()),
    ("unexplained", LOSS, {**BY_HAND, "bad_in_a_row": 4}, Clues()),
]


@pytest.mark.parametrize(("cause", "fault", "known", "clues"), ROWS)
def test_the_surest_cause(cause: str | None, fault: Fault, known: dict[str, Any], clues: Clues) -> None:
    """Of all rules the one that fits is the surest, and none says anything where nothing is wrong."""
    assert surest_cause(fault, known, clues) == cause


def test_every_rule_has_a_row() -> None:
    """A rule is called as the cause it finds, and each has a row, or a test below."""
    assert rules_of("learner") - {"ill_conditioned", "unstable_hyperparameter"} <= {row[0] for row in ROWS}


def test_the_curvature_says_which_rate_is_allowed() -> None:
    """With gᵀg and gᵀHg the evidence has the rate above which the loss stops falling. Noise, momentum and other
    directions allow less, so advice proposes a lower one, and no second number."""
    curvature = Curvature(slope=3.1, bend=200.0)
    finding = RuleSet().diagnose(Case(EXPLODING, Evidence(step=9, comparison=WORSE, lr=0.5), curvature=curvature))
    assert finding is not None
    assert finding.cause == "learning_rate_too_high"
    assert "0.031" not in finding.suggestion.removesuffix("to 0.0031 for a start.")
    assert finding.suggestion.endswith("or lower it to 0.0031 for a start.")
    assert finding.evidence["largest_rate"] == pytest.approx(0.031)


@pytest.mark.parametrize(
    ("fault", "growth", "cause"),
    [(LOSS, 1e6, "learning_rate_too_high"), (LOSS, 3.0, "unknown_operation"), (EXPLODING, 1e6, None)],
)
def test_weights_that_grew_until_numbers_gave_out(fault: Fault, growth: float, cause: str | None) -> None:
    """The rate is to blame although the bend of the loss under the good weights allows it, as with momentum; not for a
    finite suspicion, and not where the weights hardly grew."""
    overflow = Clues(origin=Origin("addmm")) if fault.certain else Clues()
    known = Evidence(step=16, healthy_steps=15, comparison=Comparison(NAN, 2.3), climbing=True, growth=growth, lr=1.0)
    finding = RuleSet().diagnose(Case(fault, known, overflow, curvature=Curvature(slope=0.4, bend=0.28)))
    assert (None if finding is None else finding.cause) == cause


@pytest.mark.parametrize(("fault", "cause"), [(EXPLODING, "unstable_hyperparameter"), (LOSS, "unexplained")])
def test_a_hyperparameter_that_diverges_by_itself_is_named(fault: Fault, cause: str) -> None:
    """It is surer than a rate that is too high, and it is no cause of a single bad batch."""
    words = "the momentum is 1.1: the sum of gradients grows. Use a momentum below 1"
    known = Evidence(step=16, lr=0.5, comparison=WORSE if fault is EXPLODING else None)
    finding = RuleSet().diagnose(Case(fault, known, unstable=words))
    assert finding is not None
    assert (finding.cause, finding.suggestion == f"{words}.") == (cause, fault is EXPLODING)


@pytest.mark.parametrize(
    ("steepest", "typical", "cause"),
    [
        (3000.0, 0.1, "ill_conditioned"),
        (3000.0, 100.0, "learning_rate_too_high"),
        (1000.0, 0.1, None),
    ],
)
def test_a_low_rate_that_diverges_is_ill_conditioned(steepest: float, typical: float, cause: str | None) -> None:
    """Where λ·ε > 2 in one direction and the others hardly bend, it is the conditioning; no allowed rate is blamed."""
    curvature = Curvature(1.0, steepest, steepest=steepest, typical=typical)
    finding = RuleSet().diagnose(Case(EXPLODING, Evidence(step=9, comparison=WORSE, lr=0.001), curvature=curvature))
    assert (None if finding is None else finding.cause) == cause


@pytest.mark.parametrize(
    ("fault", "known", "clues", "said"),
    [
        (
            EXPLODING,
            {"comparison": WORSE, "lr": 0.5},
            Clues(),
            "the learning rate is 0.5; the loss of this batch is inf, under the last good weights 1",
        ),
        (
            EXPLODING,
            {"comparison": WORSE, "lr": 0.01, "group_lr": 80.0},
            Clues(),
            "the learning rate is 0.01, and up to 80 in other parameter groups; the loss of this batch is inf",
        ),
        (
            EXPLODING,
            {"comparison": WORSE, "lr": 0.4, "highest_lr": 0.5},
            Clues(),
            "the learning rate is 0.4, and was 0.5 before; the loss",
        ),
        # The guard's own cuts are not those of the schedule.
        (
            EXPLODING,
            {"comparison": WORSE, "lr": 0.001, "highest_lr": 0.002, "multiplier": 0.5},
            Clues(),
            "the learning rate is 0.001, to which the guard has lowered it from 0.002; the loss",
        ),
        (
            EXPLODING,
            {"comparison": WORSE, "lr": 0.001, "highest_lr": 0.002, "multiplier": 0.5},
            Clues(),
            "Use a warm-up of the learning rate, or lower it",
        ),
        (
            EXPLODING,
            {"comparison": WORSE, "lr": 0.001, "highest_lr": 0.5, "multiplier": 0.5},
            Clues(),
            "the learning rate is 0.001 (0.5 times that of the schedule, by the guard), and was 0.5 before; the loss",
        ),
        # The rate of the next update is above that of the updates so far, and there is one parameter group.
        (
            EXPLODING,
            {"comparison": WORSE, "lr": 4.1, "highest_lr": 3.9, "group_lr": 4.1, "first_lr": 3.0},
            Clues(),
            "the learning rate is 4.1; the loss",
        ),
        (
            EXPLODING,
            {"comparison": WORSE, "lr": 0.4, "group_lr": 0.5, "highest_lr": 0.8, "first_lr": 0.001},
            Clues(),
            "the learning rate rose from 0.001 to 0.8, and is 0.4 now, and up to 0.5 in other parameter groups",
        ),
        # A guess at a lower rate may be above what the user had set before it rose.
        (
            STUCK,
            {"growth": 20.0, "lr": 0.51, "first_lr": 0.001},
            Clues(),
            "Look at the schedule, or whatever else raises it, or lower the peak.",
        ),
        (STUCK, {"growth": 20.0, "lr": 0.51, "first_lr": 0.51}, Clues(), "or lower it to 0.051 for a start."),
        # The guard acts on it, and the message adds the rate at which the run goes on.
        (SPIKE, {"comparison": Comparison(9.0, 0.2), "lr": 0.5}, Clues(), "learning rate, or lower it."),
        (
            BACK,
            {"first": 2.3, "levels": (0.4,), "lr": 0.5, "trial": Trial(0.6, "start", 1.0), "growth": 9.0},
            Clues(),
            "trained at the present rate, has a lower loss after equally many updates; a weight matrix grew to 9 times",
        ),
        (SPIKE, {"usual_norm": 1.5}, Clues(norm=1e9), "Clip gradients: Trainer(gradient_clip_val=3)."),
        (OVERFLOW, {}, Clues(), 'Trainer(gradient_clip_val=1, gradient_clip_algorithm="value").'),
        (
            SPIKE,
            {"usual_norm": 1.5, "comparable": False},
            Clues(norm=1e9),
            'Clip gradients: self.clip_gradients(optimizer, 3, "norm"). Or look for code that writes to gradients',
        ),
        # Of two bad tensors the weight explains the buffer.
        (
            CORRUPTED,
            {"corrupt": "buffer b", "jump": "parameter w"},
            Clues(),
            "and buffer b is no longer finite, although no earlier reading was bad. Look for code that writes to param",
        ),
        (
            SPIKE,
            {"usual_norm": 1.5},
            Clues(norm=1e9, norms=(("a", 1e9), ("b", 1e6))),
            "the gradient norm is 1e+09, usually 1.5; that of a is 1e+03 times that of b",
        ),
    ],
)
def test_suggestions_have_numbers(fault: Fault, known: dict[str, Any], clues: Clues, said: str) -> None:
    """What to do comes with the numbers it rests on."""
    finding = RuleSet().diagnose(Case(fault, Evidence(step=9, **known), clues))
    assert finding is not None
    assert said in finding.suggestion


@pytest.mark.parametrize(
    ("known", "cause"),
    [
        ({"lr": 2.5e-6, "multiplier": 1.25e-3}, None),
        ({"lr": 1e-4, "multiplier": 0.05}, "learning_rate_too_high"),
        ({"lr": 2.5e-6}, "learning_rate_too_high"),
        ({"lr": 2.5e-6, "multiplier": 1.25e-3, "growth": 9.0}, "learning_rate_too_high"),
    ],
)
def test_a_rate_that_the_guard_has_lowered_in_vain(known: dict[str, Any], cause: str | None) -> None:
    """A fault that is there again at a far lower rate, at weights that did not grow, is not that of the rate."""
    earlier = (EarlierFinding(2, EXPLODING.kind, EXPLODING.place, Finding("unknown_operation", 0.3), 0.002),)
    finding = RuleSet().diagnose(Case(EXPLODING, Evidence(step=9, comparison=WORSE, **known), earlier=earlier))
    assert (None if finding is None else finding.cause) == cause


@pytest.mark.parametrize(("rate", "cause"), [(20.0, "learning_rate_too_high"), (5.0, "log_of_zero")])
def test_weights_that_grew_early(rate: float, cause: str) -> None:
    """At a rate that the loss does not allow they are the updates' doing, before they have grown far."""
    known = Evidence(step=2, comparison=WORSE, growth=4.9, lr=rate, first=2.3, loss_unit=1.0)
    curvature = Curvature(slope=0.39, bend=0.11)
    finding = RuleSet().diagnose(Case(LOSS, known, Clues(replayed=True, origin=LOG), curvature=curvature))
    assert finding is not None
    assert finding.cause == cause


def test_a_trial_says_which_rate_to_go_to() -> None:
    """The evidence has the rate that the trial has shown to be ahead, for the message of the intervention; of a
    collapse the suggestion is to look elsewhere first."""
    said = {}
    for base in ("start", "best"):
        known = Evidence(step=99, trial=Trial(0.6, base, 1 / 64), lr=0.64, first=2.3, levels=(0.4,))  # type: ignore[arg-type]
        finding = RuleSet().diagnose(Case(STUCK, known))
        assert finding is not None
        said[finding.cause] = finding.suggestion
        assert isinstance(finding.evidence["lr"], float)
    assert "a restart with 0.0156 times the rate has a lower loss" in said["learning_rate_too_high"]
    assert said["learning_rate_too_high"].endswith("or lower it.")
    assert "the loss had come down to 0.4 and is clearly higher now; that of the untrained" in said["collapsed"]
    assert (
        "look for what changed the weights or the data. If nothing did, lower the learning rate." in said["collapsed"]
    )


@pytest.mark.parametrize("comparison", [Comparison(211.0, 204.0), Comparison(0.21, 0.17)])
def test_a_steep_batch_is_no_divergence(comparison: Comparison) -> None:
    """A batch that is far off under good weights, too, or whose loss is below the untrained model's, blames no rate."""
    known = {"usual_norm": 1.0, "first": 0.5, "loss_unit": 0.2, "comparison": comparison, "lr": 0.1, "healthy_steps": 9}
    assert surest_cause(SPIKE, known, Clues(norm=1e9)) == "exploding_gradient"
    assert surest_cause(SPIKE, {**known, "comparison": Comparison(9.0, 0.2)}, Clues()) == "learning_rate_too_high"

"""Remedies propose plan steps, check their arguments, and carry steps out on a small protocol."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import pytest

from lightning_nanguard import (
    ClipGradients,
    Detector,
    DivergingLoss,
    Fault,
    GradientSpike,
    NonFinite,
    ReduceLR,
    Remedy,
    ResetMoments,
    Rollback,
    SkipStep,
    StopTraining,
)
from lightning_nanguard.act.defaults import executors
from lightning_nanguard.act.rate_search import rehearsed_cut
from lightning_nanguard.thresholds.rate_search import CutThresholds
from lightning_nanguard.types import Clip, DropMoments, Evidence, PlanStep, Restore, Scale, Skip, Stop

GRADIENT = Fault("gradient_spike", "batch", "gradient", 1e6, certain=False, clipping_helps=True)
LOSS = Fault("exploding_loss", "learner", "loss", 1e6, certain=False, clipping_helps=True)
COLLAPSED = Fault("collapsed", "learner", "loss", 2.3, certain=False, recovers=True)
CUT = CutThresholds()
EVIDENCE = Evidence(step=100, usual_norm=2.0, lr=0.1)


@dataclass
class RunControl:
    """Writes down what is done to it."""

    done: list[tuple[object, ...]] = field(default_factory=list)
    loss: Callable[[float, int], float | None] = lambda factor, updates: None
    batches: int = 4

    def skip(self) -> None:
        self.done.append(("skip",))

    def restore(self, depth: int) -> None:
        self.done.append(("restore", depth))

    def scale(self, factor: float, min_lr: float, *, limit: bool = False) -> None:
        self.done.append(("scale", factor, min_lr))

    def clip(self, value: float, algorithm: Literal["norm", "value"]) -> None:
        self.done.append(("clip", value, algorithm))

    def drop_moments(self) -> None:
        self.done.append(("drop moments",))

    def rehearse(self, factor: float, updates: int) -> float | None:
        return self.loss(factor, updates)

    def rehearsal_batches(self) -> int:
        return self.batches


ROWS: list[tuple[Remedy, Fault, int, PlanStep | None, tuple[object, ...] | None]] = [
    (SkipStep(), GRADIENT, 0, None, None),
    (Rollback(), LOSS, 0, Restore(0), ("restore", 0)),
    (Rollback(), LOSS, 1, Restore(0), ("restore", 0)),
    (Rollback(), LOSS, 3, Restore(2), ("restore", 2)),
    (ReduceLR(), LOSS, 0, Scale(0.5), ("scale", 0.5, 0.0)),
    (ReduceLR(factor=0.5, min_lr=1e-3), LOSS, 1, Scale(0.25, 1e-3), ("scale", 0.25, 1e-3)),
    (ReduceLR(), LOSS, 9, Scale(0.1), ("scale", 0.1, 0.0)),
    (ReduceLR(factor=0.01), LOSS, 9, Scale(0.01), ("scale", 0.01, 0.0)),
    (ReduceLR(min_lr=0.1), LOSS, 0, None, None),
    (ClipGradients(), GRADIENT, 0, Clip(4.0), ("clip", 4.0, "norm")),
    (ClipGradients(3), GRADIENT, 0, Clip(3.0), ("clip", 3.0, "norm")),
    (ClipGradients(3.0, "value"), GRADIENT, 0, Clip(3.0, "value"), ("clip", 3.0, "value")),
    (ClipGradients(), LOSS, 0, Clip(4.0), ("clip", 4.0, "norm")),
    (ClipGradients(), COLLAPSED, 0, None, None),
    (ResetMoments(), LOSS, 0, None, None),
    (ResetMoments(), LOSS, 1, DropMoments(), ("drop moments",)),
    (StopTraining(), LOSS, 0, Stop("the remedies listed ask to stop when skipping is not enough"), None),
]


@pytest.mark.parametrize(("remedy", "fault", "attempt", "step", "done"), ROWS)
def test_a_remedy_proposes_and_carries_out(
    remedy: Remedy, fault: Fault, attempt: int, step: PlanStep | None, done: tuple[object, ...] | None
) -> None:
    """What is proposed at which attempt, and what the step then does."""
    assert remedy.propose(fault, EVIDENCE, attempt) == step
    if done is not None and step is not None:
        run = RunControl()
        remedy.apply(step, run)
        assert run.done == [done]


def test_auto_clipping_has_a_value_before_any_norm_was_usual() -> None:
    """Without healthy norms to take a value from it is the one most people start with."""
    assert ClipGradients().propose(GRADIENT, Evidence(step=1), 0) == Clip(1.0)


def test_the_cut_goes_where_a_rehearsal_shows_the_loss_falls() -> None:
    """Rates that ruin are passed over, and so are those that fall much slower than the best."""

    def loss(factor: float, updates: int) -> float:
        rate = 1000.0 * factor
        if updates == 0:
            return 2.3
        return math.inf if rate > 2 else 2.3 - min(2.0, rate)

    run = RunControl(loss=loss)
    ReduceLR().apply(Scale(0.5), run)
    ((_, factor, _),) = run.done
    assert isinstance(factor, float)
    assert 0.4 <= 1000 * factor <= 1


@pytest.mark.parametrize(
    ("tried", "step", "cut"),
    [
        (False, Scale(0.5, most=1.0), 0.5),
        (False, Scale(0.5, most=0.01), 0.01),
        (False, Scale(0.5, most=1e-9), 1 / 1024),
        (True, Scale(0.5, most=0.01), 0.03125),
        (True, Scale(0.5, most=0.01, firm=True), 0.01),
        (True, Scale(0.5, most=1e-9, firm=True), 0.03125 / 16),
    ],
)
def test_a_cut_and_what_the_curvature_allows(tried: bool, step: Scale, cut: float) -> None:
    """The curvature along one gradient bounds a cut that could not be rehearsed, that of the steepest direction any."""
    run = RunControl(loss=lambda factor, updates: 2.3 - 2.0 * (updates > 0) if tried else None)
    ReduceLR().apply(step, run)
    ((_, factor, _),) = run.done
    assert factor == pytest.approx(cut, rel=0.01)


def test_where_the_loss_began_far_off_a_rate_must_come_as_near_as_the_best() -> None:
    """A rate that takes the loss from 1,000 to 20 is not enough where another takes it to 0.5."""
    ends = {0.5: math.inf, 0.125: 0.5, 0.03125: 0.6, 0.0078125: 20.0}
    cut = rehearsed_cut(lambda factor, updates: 1000.0 if updates == 0 else ends.get(factor, 500.0), 0.5, CUT)
    assert cut == 0.03125


def test_no_rate_is_tried_below_those_that_may_be_taken() -> None:
    """A sixteenth of the best rate is the least that is taken, so nothing below it is tried."""
    tried: list[float] = []

    def rehearse(factor: float, updates: int) -> float:
        tried.append(factor)
        return 2.3 if updates == 0 else math.inf if factor > 0.2 else 0.3

    assert rehearsed_cut(rehearse, 0.5, CUT) == 0.125 / 16
    assert tried[1:] == [0.5, 0.125, 0.125 / 4, 0.125 / 16]


@pytest.mark.parametrize(
    ("ends", "cut"),
    [
        ({0.125: 0.6, 0.125 / 4: 2.6, 0.125 / 16: 0.3, 0.125 / 64: 0.4}, 0.125 / 64),
        ({0.125: 0.6, 0.125 / 4: 2.6, 0.125 / 16: 0.3}, 0.125 / 32),
        ({0.125: 0.6, 0.125 / 4: 2.6}, 0.125 / 2),
        ({0.125: 0.6, 0.125 / 4: 2.6, 0.125 / 16: 1.0, 0.125 / 64: 1.0}, 0.125 / 2),
        ({0.125: 0.6, 0.125 / 4: 2.6, 0.125 / 16: 0.99}, 0.125 / 2),
        ({0.125: 0.6, 0.125 / 4: 1.05}, 0.125 / 2),
    ],
    ids=["a lower one helps", "it alone", "none does", "none moves it", "hardly any", "no harm, only slow"],
)
def test_a_rate_that_is_good_by_accident_is_not_taken(ends: dict[float, float], cut: float) -> None:
    """Where a rate makes things worse, a larger one that made them better did so by killing units, say: the search goes
    on below both, and only where nothing helps there is it better than none."""
    ends = {0.5: math.inf, **ends}
    assert rehearsed_cut(lambda factor, updates: ends.get(factor, 1.02) if updates else 1.0, 0.5, CUT) == cut


@pytest.mark.parametrize(("slow", "cut"), [(0.04, 0.125 / 256), (0.5, 0.125 / 64)])
def test_batches_learned_by_heart_do_not_choose_a_large_rate(slow: float, cut: float) -> None:
    """Where the best rate takes them to nothing, so does a far lower one within the same updates: that is taken."""
    ends = {0.5: math.inf, 0.125: 0.0, 0.125 / 4: 1e-6, 0.125 / 16: 1e-3, 0.125 / 64: 0.01, 0.125 / 256: slow}
    assert rehearsed_cut(lambda factor, updates: ends.get(factor, 0.95) if updates else 1.0, 0.5, CUT) == cut


def test_a_model_that_has_learned_is_not_said_to_learn_by_heart() -> None:
    """Where the loss is next to nothing before any update, rates that bring nothing are as bad as ever."""
    ends = {0.5: math.inf, 0.125: 0.001, 0.125 / 4: 0.0018}
    assert rehearsed_cut(lambda factor, updates: ends.get(factor, 0.002) if updates else 0.002, 0.5, CUT) == 0.0625


@pytest.mark.parametrize(("batches", "began", "cut"), [(4, 2.3, 0.0625), (2, 2.3, 0.03125), (4, 0.5, 0.03125)])
def test_how_much_of_the_best_gain_may_be_missing(batches: int, began: float, cut: float) -> None:
    """Up to half; less where the loss came down by more than half, unless on two batches, soon known by heart."""
    best = 0.3
    ends = {0.5: math.inf, 0.125: best, 0.03125: best + 0.4 * (began - best)}
    run = RunControl(loss=lambda factor, updates: ends.get(factor, began) if updates else began, batches=batches)
    ReduceLR().apply(Scale(0.5), run)
    [(_, factor, _)] = run.done
    assert factor == cut


@pytest.mark.parametrize(
    ("clipped", "whole", "half", "eighth", "cut"),
    [
        (True, 0.3, 0.5, 0.6, None),
        (True, 0.23, 0.5, 0.2, None),
        (True, 0.3, 0.5, 0.2, 0.125),
        (True, 0.5, 0.3, 0.2, 0.125),
        (True, math.inf, math.inf, 0.2, 0.125),
        (True, 2.5, math.inf, 0.2, 0.125),
        (True, None, None, None, 0.5),
        (False, 0.3, 0.5, 0.2, 0.125),
    ],
)
def test_clipping_may_do_without_a_cut(
    clipped: bool, whole: float | None, half: float | None, eighth: float | None, cut: float | None
) -> None:
    """Where the rate as it is learns under the new clipping, and about as fast as at half or less, it stays; else it is
    cut."""
    ends = {1.0: whole, 0.5: half}
    run = RunControl(loss=lambda factor, updates: ends.get(factor, eighth) if updates else 2.3)
    ReduceLR().apply(Scale(0.5, clipped=clipped), run)
    assert [done[1] for done in run.done] == ([] if cut is None else [pytest.approx(cut, rel=1.0)])


@pytest.mark.parametrize("after", [None, 2.4, math.inf, 2.3])
def test_a_rehearsal_that_says_nothing_changes_nothing(after: float | None) -> None:
    """Where no rate helps, or none can be tried, the proposed cut stays."""
    assert rehearsed_cut(lambda factor, updates: after if updates else 2.3, 0.5, CUT) is None
    assert rehearsed_cut(lambda factor, updates: None, 0.5, CUT) is None


def test_without_rehearsals_the_cut_follows_the_growth_of_the_weights() -> None:
    """Under manual optimization weights that grew 200 times say how far the rate is off."""
    blind = replace(EVIDENCE, comparable=False, growth=200.0)
    assert ReduceLR().propose(LOSS, blind, 0) == Scale(1 / 400)
    assert ReduceLR().propose(LOSS, replace(blind, growth=5.0), 0) == Scale(0.5)


def test_an_optimizer_that_estimates_curvature_is_not_clipped() -> None:
    """Clipped gradients would spoil what LBFGS makes of their differences."""
    assert ClipGradients().propose(GRADIENT, replace(EVIDENCE, clippable=False), 0) is None


def test_rehearsing_can_be_turned_off() -> None:
    """With rehearse=False no update is tried."""
    run = RunControl(loss=lambda factor, updates: 0.1)
    ReduceLR(rehearse=False).apply(Scale(0.5), run)
    assert run.done == [("scale", 0.5, 0.0)]


def test_every_step_has_an_executor_and_the_users_comes_first() -> None:
    """A listed remedy carries out its own kind of step; the package's own steps always have one."""
    mine = ReduceLR(factor=0.3)
    found = executors([mine])
    assert found[Scale] is mine
    assert {Skip, Restore, Scale, Clip, DropMoments, Stop} <= set(found)
    with pytest.raises(ValueError, match="ReduceLR and ReduceLR both carry out Scale"):
        executors([ReduceLR(), ReduceLR()])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReduceLR(factor=1.0), r"ReduceLR\(factor=1.0\): expected a number between 0 and 1"),
        (lambda: ReduceLR(min_lr=-1.0), r"ReduceLR\(min_lr=-1.0\)"),
        (lambda: ReduceLR(recover_after=0), r"ReduceLR\(recover_after=0\)"),
        (lambda: ClipGradients(clip_val=0.0), r"ClipGradients\(clip_val=0.0\)"),
        (lambda: ClipGradients(clip_val=math.inf), r"ClipGradients\(clip_val=inf\)"),
        (lambda: ClipGradients(clip_val="much"), r"ClipGradients\(clip_val='much'\)"),  # type: ignore[arg-type]
        (lambda: ClipGradients(algorithm="value"), r"ClipGradients\(algorithm='value'\)"),
        (lambda: ClipGradients(1.0, "l1"), r"ClipGradients\(algorithm='l1'\)"),  # type: ignore[arg-type]
        (lambda: NonFinite(overflow_patience=0), r"NonFinite\(overflow_patience=0\)"),
        (lambda: NonFinite(min_loss_scale=0.0), r"NonFinite\(min_loss_scale=0.0\)"),
        (lambda: GradientSpike(threshold=0.0), r"GradientSpike\(threshold=0.0\)"),
        (lambda: GradientSpike(ratio=1.0), r"GradientSpike\(ratio=1.0\)"),
        (lambda: GradientSpike(window=5), r"GradientSpike\(window=5\)"),
        (lambda: DivergingLoss(factor=1.0), r"DivergingLoss\(factor=1.0\)"),
        (lambda: DivergingLoss(patience=1), r"DivergingLoss\(patience=1\)"),
        (lambda: DivergingLoss(warmup=0), r"DivergingLoss\(warmup=0\)"),
    ],
)
def test_arguments_are_checked(make: Callable[[], Remedy | Detector], message: str) -> None:
    """An argument out of range is named with its value when the object is made."""
    with pytest.raises(ValueError, match=message):
        make()

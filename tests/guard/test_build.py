"""A guard is put together from what a loop gives."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from torch import Tensor

from lightning_nanguard import Detector, Fault, Reading, ReduceLR, Rollback, TrainingDivergedError
from lightning_nanguard.guard.context import Settings
from lightning_nanguard.guard.local_readback import LocalReadback
from lightning_nanguard.guard.rank_readback import RankReadback
from lightning_nanguard.guard.readback import MAX_DELAY
from lightning_nanguard.thresholds import Thresholds
from lightning_nanguard.thresholds.detection import DetectionThresholds, NonFiniteThresholds
from tests.guard.memory_ranks import memory_ranks
from tests.guard.plain_loop import EVIDENCE, PlainLoop

DEFAULTS = Thresholds()


class BadLoss(PlainLoop):
    """Every loss is NaN, whatever the batch."""

    def loss(self) -> Tensor:
        return super().loss() * math.nan


def test_a_threshold_is_set_without_patching() -> None:
    """A run whose first updates are all bad ends after as many as the threshold says, instead of after 64."""
    blame = replace(DEFAULTS.decision.blame, patience_with_chance=3)
    thresholds = replace(DEFAULTS, decision=replace(DEFAULTS.decision, blame=blame))
    loop = BadLoss(thresholds=thresholds)
    with pytest.raises(TrainingDivergedError, match="the first 3 were all bad"):
        loop.run(20)
    assert loop.step == 3


def test_thresholds_reach_the_default_detectors() -> None:
    """Where a user lists no detectors, the default ones go by the thresholds given."""
    detection = DetectionThresholds(non_finite=NonFiniteThresholds(max_norm=1e-6))
    loop = PlainLoop(thresholds=replace(DEFAULTS, detection=detection))
    loop.run(20)
    assert [record.fault for record in loop.records] == ["gradient_overflow"] * 20


class Once(Detector):
    """Is sure at one step that the learner has diverged."""

    def __init__(self, step: int) -> None:
        self.step = step

    def check(self, reading: Reading) -> Fault | None:
        fault = Fault("mine", "learner", "loss", reading.loss, certain=False, proof="none")
        return fault if reading.step == self.step else None


@pytest.mark.parametrize(("tries", "cut"), [(0, 0.5), (10, 0.125)])
def test_thresholds_reach_the_default_remedies(tries: int, cut: float) -> None:
    """Where a user lists no remedies, the cut is the planned one if no rate may be tried, and else the one found."""
    limits = replace(DEFAULTS.rate_search, cut=replace(DEFAULTS.rate_search.cut, tries=tries))
    loop = PlainLoop(settings=EVIDENCE, detectors=[Once(13)], thresholds=replace(DEFAULTS, rate_search=limits))
    loop.run(14)
    assert loop.guard.context.rate.multiplier == cut


@pytest.mark.parametrize(
    ("settings", "ranks", "kind", "batches"),
    [
        (Settings(), 1, LocalReadback, 1),
        (Settings(deferred=True), 1, LocalReadback, MAX_DELAY + 2),
        (Settings(observe=True), 1, LocalReadback, 1),
        (Settings(), 2, RankReadback, MAX_DELAY + 2),
        (Settings(deferred=True), 2, RankReadback, MAX_DELAY + 2),
    ],
    ids=["step", "deferred", "observe", "ranks", "deferred ranks"],
)
def test_the_readback_fits_settings_and_ranks(settings: Settings, ranks: int, kind: type, batches: int) -> None:
    """Readings arrive at once, late, or from all ranks; as many batches can be undone as may still be judged."""
    parts = PlainLoop(settings=settings, ranks=memory_ranks(ranks)[0]).guard._parts
    assert type(parts.readback) is kind
    assert len(parts.steps.undos._undos) == batches


class Never(Detector):
    """Finds nothing."""

    def check(self, reading: Reading) -> Fault | None:
        return None


def test_no_detectors_and_no_remedies_are_a_choice() -> None:
    """An empty list is not replaced by the defaults: without detectors nothing is found in a reading."""
    for detectors in ([], [Never()]):
        loop = PlainLoop(detectors=detectors)
        loop.run(3, lambda step, batch: batch.mul_(1e30) if step == 2 else None)
        assert loop.records == []


def test_two_remedies_for_one_step_are_refused() -> None:
    """The guard says so when it is made."""
    with pytest.raises(ValueError, match="ReduceLR and ReduceLR both carry out Scale"):
        PlainLoop(remedies=[Rollback(), ReduceLR(0.5), ReduceLR(0.1)])

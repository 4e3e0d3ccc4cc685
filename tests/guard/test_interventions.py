"""From a fault that was found to what is done about it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lightning_nanguard import Detector, Fault, Reading, Remedy
from lightning_nanguard.act.defaults import default_remedies
from lightning_nanguard.guard.context import Settings
from lightning_nanguard.types import Evidence, PlanStep
from tests.guard.plain_loop import EVIDENCE, PlainLoop, is_finite, nan_at, remedies


class FindsAt(Detector):
    """Finds a fault at one step, and keeps what it is told."""

    def __init__(self, step: int, fault: Fault) -> None:
        self.step = step
        self.fault = fault

    def check(self, reading: Reading) -> Fault | None:
        return self.fault if reading.step == self.step else None

    def accept(self, reading: Reading) -> None:
        ACCEPTED.append(reading.step)

    def dismiss(self, reading: Reading) -> None:
        DISMISSED.append(reading.step)


ACCEPTED: list[int] = []
DISMISSED: list[int] = []


@pytest.fixture(autouse=True)
def _nothing_told() -> None:
    # The guard copies detectors, so what they are told is kept outside of them.
    ACCEPTED.clear()
    DISMISSED.clear()


def test_a_users_detector_and_its_scope_route_the_remedy() -> None:
    """What a detector of the user's calls a batch's fault is skipped."""
    loop = PlainLoop(detectors=[FindsAt(13, Fault("unlucky", "batch", "loss", 1.0, "step 13"))])
    loop.run(20)
    assert [(record.fault, record.remedies) for record in loop.records] == [("unlucky", ("skip",))]


def test_a_suspicion_without_evidence_changes_nothing() -> None:
    """It is not on record, the detector is told, and the reading counts as a healthy one after all."""
    suspicion = Fault("mine", "learner", "loss", 1.0, certain=False)
    loop = PlainLoop(settings=EVIDENCE, detectors=[FindsAt(13, suspicion)])
    loop.run(20)
    loop.guard.state_dict()  # detectors are up to date then
    assert loop.records == []
    assert DISMISSED == [13]
    assert list(range(1, 21)) == ACCEPTED
    assert loop.guard.context.state.healthy_steps == 19


def test_a_suspicion_that_nothing_has_to_confirm_is_acted_on() -> None:
    """With ``proof="none"`` the detector's word is enough: the learner is restored and corrected."""
    suspicion = Fault("mine", "learner", "loss", 1.0, certain=False, proof="none")
    loop = PlainLoop(settings=EVIDENCE, detectors=[FindsAt(13, suspicion)])
    loop.run(20)
    assert remedies(loop) == [("restore", "scale")]
    assert DISMISSED == []


@pytest.mark.parametrize("corrupt", [False, True])
def test_some_faults_count_only_where_the_state_is_corrupt(corrupt: bool) -> None:
    """A bad validation loss under a sound learner is on record, and nothing is done: most likely the data are bad."""
    loop = PlainLoop()
    loop.run(20)
    if corrupt:
        with torch.no_grad():
            loop.net.bias[0] = math.nan
    loop.guard.report(Fault("non_finite_validation", "state", "val_loss", only_if_corrupt=True))
    assert [(one.fault, one.remedies) for one in loop.records] == [
        ("non_finite_validation", ("restore",) if corrupt else ())
    ]
    assert loop.records[0].place == ("parameter bias" if corrupt else "val_loss")
    assert is_finite(loop)


def test_a_lasting_rise_of_the_gradient_is_accepted() -> None:
    """A task that changes for good costs a few skipped batches, not the run."""
    loop = PlainLoop(settings=EVIDENCE)
    loop.run(60)

    def switch(step: int, batch: Tensor) -> None:
        batch *= 30.0

    with torch.no_grad():
        loop.net.weight.zero_()  # the new task has large gradients, and all is well
    loop.run(60, switch)
    assert len(loop.records) <= 6
    assert not any("restore" in record.remedies for record in loop.records[1:])


def test_a_rise_that_lasts_becomes_what_is_usual() -> None:
    """After four bad batches in a row, none of them strange, norms like theirs are no spikes any more."""
    loop = PlainLoop(lr=1e-7, settings=EVIDENCE)
    loop.run(60)
    loop.run(60, lambda step, batch: batch.mul_(1000.0))
    assert remedies(loop) == [("skip",)] * 4


@dataclass(frozen=True)
class Page(PlanStep):
    """Says something to somebody."""

    text: str


class PageSomebody(Remedy):
    """Keeps what it says."""

    word, step = "page", Page

    def __init__(self) -> None:
        self.sent: list[str] = []

    def propose(self, fault: Fault, evidence: Evidence, attempt: int) -> PlanStep | None:
        return Page(fault.message)

    def apply(self, step: PlanStep, run: object) -> None:
        assert isinstance(step, Page)
        self.sent.append(step.text)


@pytest.mark.parametrize("observe", [False, True])
def test_a_remedy_of_the_users_own_is_carried_out(observe: bool) -> None:
    """It is heard at a skipped batch and at a restore, beside the remedies of the package, and on record by its word;
    an observing guard only records it."""
    page = PageSomebody()
    settings = Settings(snapshot_every=4, observe=observe)
    loop = PlainLoop(remedies=[*default_remedies(), page], settings=settings)
    loop.run(20, nan_at(12))
    with torch.no_grad():
        loop.net.bias[0] = math.nan
    loop.guard.check()
    assert (remedies(loop)[0], remedies(loop)[-1]) == (("skip", "page"), ("restore", "page"))
    assert [text.split(" is ")[0] for text in page.sent] == ([] if observe else ["the loss", "parameter bias"])


class Shows(PlainLoop):
    """Keeps its newest batches, and shows them again."""

    def __init__(self, kept: int) -> None:
        super().__init__(settings=Settings(snapshot_every=4, deferred=True))
        self.kept: deque[tuple[int, Tensor]] = deque(maxlen=kept)
        self.asked: list[bool] = []

    def train(self, batch: Tensor) -> None:
        self.kept.append((self.guard.updates + 1, batch))
        super().train(batch)

    @contextmanager
    def showing(self, update: int) -> Iterator[bool]:
        batch = self.batch
        self.batch = dict(self.kept).get(update, batch)
        yield update in dict(self.kept)
        self.batch = batch

    def batch_finite(self) -> bool | None:
        self.asked.append(bool(torch.isfinite(self.batch).all()))
        return self.asked[-1]


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize(("kept", "shown"), [(4, True), (1, False)])
def test_the_batch_of_a_late_fault_is_looked_at(kept: int, shown: bool) -> None:
    """The loop shows it again; where it is gone, the batch at hand, which is another, is not taken for it."""
    loop = Shows(kept)
    loop.run(12)
    loop.train(torch.full((8, 3), math.nan))
    for _ in range(2):
        loop.train(torch.randn(8, 3))
    loop.guard.flush()
    assert len(loop.records) == 1
    assert (loop.records[0].cause == "non_finite_input") is shown
    assert loop.asked == ([False] if shown else [])


def test_first_readings_stay_known_when_updates_are_made_again() -> None:
    """After a bad update of a blameless learner is undone, what it read before that stays in the history, so that bad
    data cannot become what is usual."""
    loop = PlainLoop(settings=Settings(snapshot_every=100, deferred=True))
    loop.run(10, nan_at(9))
    history = loop.guard.context.monitors.history(0)
    assert remedies(loop) == [("restore",)]
    assert loop.records[0].snapshot_step == 0
    assert len(history.losses()) == 9

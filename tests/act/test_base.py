"""What a remedy is for, and how one of your own is written."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from lightning_nanguard import (
    ClipGradients,
    Fault,
    ReduceLR,
    Remedy,
    ResetMoments,
    Rollback,
    SkipStep,
    StopTraining,
)
from lightning_nanguard.types import Evidence, PlanStep, Restore, Role
from tests.act.run_control import RunControl


@dataclass(frozen=True)
class Page(PlanStep):
    """A kind of step of one's own."""

    text: str


@dataclass(frozen=True)
class RestoreFromDisk(Restore):
    """A kind of restore of one's own."""


class PageSomebody(Remedy):
    """As in the docstring of Remedy."""

    word, step = "page", Page

    def propose(self, fault: Fault, evidence: Evidence, attempt: int) -> PlanStep | None:
        return Page(fault.message)

    def apply(self, step: PlanStep, run: object) -> None:
        assert isinstance(step, Page)


class LoadsFromDisk(PageSomebody):
    """Restores in a way of its own."""

    word, step = "load", RestoreFromDisk


class HalvesRate(PageSomebody):
    """Has a step of its own, and a role that is not to notify."""

    word, step, role = "halve", Page, "rate"


@pytest.mark.parametrize(
    ("remedy", "role"),
    [
        (SkipStep(), "skip"),
        (Rollback(), "restore"),
        (ReduceLR(), "rate"),
        (ClipGradients(), "clip"),
        (ResetMoments(), "moments"),
        (StopTraining(), "stop"),
        (PageSomebody(), "notify"),
        (LoadsFromDisk(), "restore"),
        (HalvesRate(), "rate"),
    ],
)
def test_the_role_is_that_of_the_step(remedy: Remedy, role: Role) -> None:
    """A kind of step of one's own notifies, one derived from the package's has its role, and a class attribute says
    otherwise."""
    assert remedy.role == role


def test_what_a_remedy_lacks_is_said_when_it_is_made() -> None:
    """One that cannot propose or carry out is no remedy."""

    class Silent(Remedy):
        word, step = "silent", Page

        def propose(self, fault: Fault, evidence: Evidence, attempt: int) -> PlanStep | None:
            return None

    with pytest.raises(TypeError, match=r"abstract.*apply"):
        Silent()


def test_a_run_that_remedies_are_tried_on_is_enough_for_one_of_ones_own() -> None:
    """A remedy needs no guard and no Trainer to be tested."""
    run = RunControl()
    step = PageSomebody().propose(Fault("mine", "batch", "loss", message="look here"), Evidence(step=3), 0)
    assert step == Page("look here")
    PageSomebody().apply(step, run)
    assert run.done == []

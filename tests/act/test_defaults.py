"""The remedies used by default, and who carries out which step."""

from __future__ import annotations

import pytest

from lightning_nanguard import ClipGradients, Fault, ReduceLR, Rollback, SkipStep
from lightning_nanguard.act.defaults import default_remedies, executors
from lightning_nanguard.thresholds.rate_search import CutThresholds
from lightning_nanguard.types import Clip, DropMoments, Evidence, Restore, RestoreAverages, Scale, Skip, Stop


def test_every_step_has_an_executor_and_the_users_comes_first() -> None:
    """A listed remedy carries out its own kind of step; the package's own steps always have one."""
    mine = ReduceLR(factor=0.3)
    found = executors([mine])
    assert found[Scale] is mine
    assert {Skip, Restore, RestoreAverages, Scale, Clip, DropMoments, Stop} <= set(found)
    with pytest.raises(ValueError, match="ReduceLR and ReduceLR both carry out Scale"):
        executors([ReduceLR(), ReduceLR()])


def test_the_default_remedies_and_their_order() -> None:
    """Back to a good state first, then clipping, then the rate; the last goes by the thresholds given."""
    remedies = default_remedies(CutThresholds(most_escalated=0))
    assert [type(remedy) for remedy in remedies] == [Rollback, ClipGradients, ReduceLR]
    fault = Fault("mine", "learner", "loss")
    assert remedies[2].propose(fault, Evidence(step=9), 5) == Scale(0.5)
    assert default_remedies()[2].propose(fault, Evidence(step=9), 5) == Scale(0.1)


def test_steps_that_the_policy_makes_itself_can_be_carried_out() -> None:
    """Skips and restores need no listed remedy."""
    assert isinstance(executors([])[Skip], SkipStep)
    assert [remedy.word for remedy in executors([]).values()] == [
        "skip",
        "restore",
        "restore averages",
        "restore scale",
        "scale",
        "clip",
        "reset moments",
        "stop",
    ]

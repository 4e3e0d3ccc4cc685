"""What an intervention has gained or cost is found out beside the run, and taken back where it cost."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from lightning_nanguard import NaNGuard
from lightning_nanguard.guard.receipts import Receipts
from lightning_nanguard.record.receipts import Receipt
from tests.guard.branching import BranchingLoop
from tests.guard.plain_loop import remedies
from tests.helpers import batches, copied, fit, task


def receipts_of(loop: BranchingLoop) -> Receipts:
    """What compares interventions of a loop."""
    return loop.guard._parts.beside.receipts


def given(loop: BranchingLoop) -> list[Receipt]:
    """The receipts so far."""
    return loop.guard.context.receipts.given


def test_an_intervention_that_gained() -> None:
    """A run that was ruined by its rate is compared with itself without the rollback, on the same batches. After a
    trial a plain difference on the first batches is enough."""
    loop = BranchingLoop(lr=2.0)
    loop.run(320)
    (receipt,) = given(loop)
    assert (receipt.verdict, receipt.updates, receipt.taken_back) == ("gained", 21, False)
    assert receipt.intervention_step == loop.records[0].global_step
    assert receipt.loss is not None
    assert receipt.loss_without is not None
    assert receipt.loss < 0.1 < receipt.loss_without


def test_an_intervention_that_cost_is_taken_back() -> None:
    """A cut to next to nothing in a healthy run is found to cost in one comparison, and the run goes on as the one
    without it: bit by bit its weights and its rate."""
    loop, alone = BranchingLoop(lr=0.02), BranchingLoop(lr=0.02)
    loop.run(2)
    alone.run(2)
    receipts_of(loop).before(loop.step, skipped=False)
    loop.guard.context.rate.set_multiplier(1e-4)
    loop.run(64)
    alone.run(64)
    (receipt,) = given(loop)
    assert (receipt.verdict, receipt.taken_back) == ("cost", True)
    assert remedies(loop) == [("take back",)]
    assert "the intervention of step 2 did harm: 64 updates later" in loop.records[0].message
    assert (loop.records[0].lr_before, loop.records[0].lr_after) == (pytest.approx(2e-6), 0.02)
    assert copied(loop.net.state_dict()).keys() == alone.net.state_dict().keys()
    assert all(torch.equal(mine, alone.net.state_dict()[name]) for name, mine in loop.net.state_dict().items())
    assert loop.guard.context.rate.ratio() == 1.0
    ring = loop.guard.context.ring
    assert ring.beside is not None
    loop.run(4)
    assert ring.beside is None  # a state of the run itself is certified
    assert ring.certified[0].step >= 66


def test_an_intervention_that_made_no_difference() -> None:
    """A skipped batch among many is said to have made none, and nothing is changed."""
    loop = BranchingLoop(lr=0.05)
    loop.run(100)
    receipts_of(loop).before(loop.step, skipped=True)
    loop.run(128)
    (receipt,) = given(loop)
    assert (receipt.verdict, receipt.taken_back) == ("no difference", False)
    assert loop.records == []


def test_what_is_not_measured_says_why() -> None:
    """The reason is given where the run ends first, goes back again, makes another intervention, or cannot run a batch
    again."""
    loop = BranchingLoop(lr=0.05)
    loop.run(20)
    receipts = receipts_of(loop)
    receipts.before(loop.step, skipped=False)
    receipts.before(loop.step, skipped=False)
    with torch.no_grad():
        loop.net.weight.fill_(math.nan)
    loop.run(3)
    receipts.before(loop.step, skipped=False)
    loop.runs_again = False
    loop.run(1)
    loop.runs_again = True
    receipts.before(loop.step, skipped=False)
    loop.run(3)
    loop.guard.close()
    assert [one.verdict for one in given(loop)] == ["not measured"] * 4
    assert [one.reason for one in given(loop)] == [
        "another intervention was made",
        "the run was rolled back again",
        "a batch could not be run again",
        "the run ended first",
    ]


def test_skips_are_compared_together() -> None:
    """While a comparison runs, its branch makes the updates that the run skips. So it ends however many there are."""
    loop = BranchingLoop(lr=0.05)
    loop.run(20)
    for _ in range(8):
        receipts_of(loop).before(loop.step, skipped=True)
        loop.run(20)
    last, together = given(loop)[-1], given(loop)[:-1]
    assert (last.intervention_step, last.verdict) == (20, "no difference")
    assert {one.reason for one in together} == {"it is compared together with the intervention of step 20"}


def test_no_certain_skip_is_compared(tmp_path: Path) -> None:
    """A batch whose gradient and inputs are both out of all proportion is skipped in both settings, for certain."""
    data = batches(count=60)
    data[40] = data[40][0] * 1e6, data[40][1] * 1e6
    for act_on in ("certain", "evidence"):
        guard = NaNGuard(act_on=act_on)
        fit(task(), data, guard, folder=tmp_path)
        assert [(one.fault, one.remedies) for one in guard.interventions] == [("gradient_spike", ("skip",))]
        assert list(guard.receipts) == []


def test_the_run_is_not_touched_while_it_is_compared() -> None:
    """The losses and weights are bit by bit those of a run that is not compared."""
    loop, alone = BranchingLoop(lr=0.05), BranchingLoop(lr=0.05)
    loop.run(10)
    alone.run(10)
    receipts_of(loop).before(loop.step, skipped=False)
    loop.run(40)
    alone.run(40)
    assert all(torch.equal(mine, alone.net.state_dict()[name]) for name, mine in loop.net.state_dict().items())

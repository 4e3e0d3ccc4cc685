"""Healthy readings are told from faults, and both wait for the end of the batch."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lightning_nanguard import Detector, Fault, Reading
from lightning_nanguard.guard.readback import Arrived
from tests.guard.plain_loop import EVIDENCE, PlainLoop, remedies

BAD = Reading(50, 0, math.nan, math.nan, finite=False, loss_finite=False)


def started() -> PlainLoop:
    loop = PlainLoop()
    loop.run(40)
    loop.guard.open_batch()
    return loop


def test_a_healthy_reading_waits_for_the_end_of_its_batch() -> None:
    """It is kept, and nothing is found."""
    loop = started()
    judge, undo = loop.guard._parts.judge, loop.guard._parts.steps.undos.present
    healthy = Reading(50, 0, 0.01, 0.01)
    judge.judge(Arrived(healthy, undo), 0)
    assert judge.readings == [healthy]
    assert judge.take_found() == []


def test_a_bad_reading_is_found_and_its_step_is_skipped() -> None:
    """It is no history, it is counted, and a bad batch in a row is counted once when the fault is taken."""
    loop = started()
    parts = loop.guard._parts
    parts.judge.judge(Arrived(BAD, parts.steps.undos.present), 0)
    assert parts.skipper.skipped == {0}
    assert parts.judge.readings == []
    [found] = parts.judge.take_found()
    assert (found.fault.kind, found.reached, loop.guard.non_finite) == ("non_finite_loss", False, 1)
    assert loop.guard.context.state.bad_in_a_row == 1
    assert parts.judge.take_found() == []


def test_late_readings_are_judged_up_to_the_first_fault() -> None:
    """What comes after it is left where it was, and the weights are known to be bad."""
    loop = started()
    parts = loop.guard._parts
    readings = iter(
        [
            Arrived(BAD, parts.steps.undos.present, reached=True, late=True),
            Arrived(BAD, parts.steps.undos.present, late=True),
        ]
    )
    parts.judge.judge_late(readings, 0)
    assert len(list(readings)) == 1
    assert parts.judge.weights_are_bad()
    parts.judge.judge_late(iter([Arrived(BAD, parts.steps.undos.present)]), 0)
    assert len(parts.judge.take_found()) == 1


def test_a_further_evaluation_of_one_step_is_no_history() -> None:
    """LBFGS looks at places far off on purpose: a healthy reading of one is not kept."""
    loop = started()
    judge, undo = loop.guard._parts.judge, loop.guard._parts.steps.undos.present
    judge.judge(Arrived(Reading(50, 0, 0.01, 0.01), undo, line_search=True), 0)
    assert judge.readings == []


class FindsAt(Detector):
    """Finds a fault at one step."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault

    def check(self, reading: Reading) -> Fault | None:
        return self.fault if reading.step == 13 else None


class Asked(PlainLoop):
    """Says of each batch how strange it is, and counts how often a batch was run again."""

    def __init__(self, strange: bool, extreme: bool, **options: object) -> None:
        super().__init__(**options)
        self.answers = {False: strange, True: extreme}
        self.probes = 0

    def batch_strange(self, *, extreme: bool = False) -> bool | None:
        return self.answers[extreme]

    def probe(self, *, redrawn: bool = False) -> float | None:
        self.probes += 1
        return super().probe()


LEARNER = Fault("mine", "learner", "loss", 1.0, "the loss is 1", certain=False, proof="none")
SPIKE = Fault("mine", "batch", "gradient", 1.0, "the norm is 1", certain=False)
EXTREME = Fault("mine", "batch", "gradient", 1.0, "the norm is 1", certain=False, extreme=True)
DOUBTFUL = Fault("mine", "batch", "gradient", 1.0, "the norm is 1", certain=False, doubtful=True)


@pytest.mark.parametrize(
    ("fault", "strange", "done", "advised"),
    [
        (LEARNER, (True, True), [], ["mine"]),
        (SPIKE, (True, True), [], ["mine"]),
        (EXTREME, (True, False), [], ["mine"]),
        (EXTREME, (True, True), [("skip",)], []),
        (DOUBTFUL, (True, True), [], []),
    ],
    ids=["learner", "batch", "gradient out of proportion", "inputs, too", "doubtful"],
)
def test_finite_suspicions_are_advice(
    fault: Fault, strange: tuple[bool, bool], done: list[tuple[str, ...]], advised: list[str]
) -> None:
    """Under ``act_on="certain"`` only a gradient and inputs out of all proportion are acted on; of other suspicions the
    user is told, their readings are healthy ones, and no batch is run again."""
    loop = Asked(*strange, detectors=[FindsAt(fault)])
    loop.run(20)
    assert remedies(loop) == done
    assert [one.cause for one in loop.advice] == advised
    assert loop.guard.context.state.healthy_steps == 20 - len(done)
    assert loop.probes == 0 or done
    assert all(fault.message in one.suggestion and "Nothing was changed" in one.suggestion for one in loop.advice)


def test_weights_that_grew_name_the_rate() -> None:
    """Of a suspicion of the learner the growth of its weights shows the cause, and no batch is run again."""
    for factor, cause in ((50.0, "learning_rate_too_high"), (4.0, "mine")):
        loop = Asked(True, True, detectors=[FindsAt(replace(LEARNER, proof="trial"))])
        loop.run(12)
        group = {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 80.0}
        loop.guard.context.learner.optimizers[0].add_param_group(group)
        with torch.no_grad():
            loop.net.weight.mul_(factor / float(loop.net.weight.norm()))
        loop.run(4)
        assert [one.cause for one in loop.advice] == [cause]
        for words in ("a weight matrix grew to", "up to 80 in other parameter groups"):
            assert (words in loop.advice[0].suggestion) == (cause != "mine")
        assert LEARNER.message in loop.advice[0].suggestion
        assert loop.probes == 0


@pytest.mark.parametrize("fault", [SPIKE, EXTREME])
def test_evidence_acts_on_the_same_suspicions(fault: Fault) -> None:
    """Under ``act_on="evidence"`` such a batch is skipped, and there is no advice."""
    loop = Asked(False, False, settings=EVIDENCE, detectors=[FindsAt(fault)])
    loop.run(20)
    assert (remedies(loop), loop.advice) == ([("skip",)], [])

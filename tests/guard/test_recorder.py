"""Records, and the error that ends a run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_nanguard import Budget, Fault, Finding, TrainingDivergedError
from lightning_nanguard.guard.recorder import InterventionRecorder
from tests.guard.plain_loop import PlainLoop, nan_at

FAULT = Fault("mine", "learner", "loss", 7.0, "the loss is 7")
FINDING = Finding("dead_relu", 0.9, place="layer 3", suggestion="Lower the rate.")


def recorder_of(loop: PlainLoop, memory: int = 4) -> InterventionRecorder:
    return InterventionRecorder(loop.guard.context, loop, memory=memory)


def test_the_clock_of_an_update_is_that_of_its_batch() -> None:
    """A batch may have several updates; what is no longer remembered, or not yet over, is under the clock of now."""
    loop = PlainLoop()
    recorder = recorder_of(loop, memory=2)
    for loop.step, loop.guard.context.state.step in ((1, 2), (2, 4), (3, 6)):
        recorder.mark()
    loop.step = 4
    clocks = [recorder.clock(step)[0] for step in range(3, 8)]
    assert clocks == [2, 2, 3, 3, 4]


def test_a_record_says_what_was_done_and_why() -> None:
    """Fault, place, words, finding, and the rates before and after."""
    loop = PlainLoop()
    loop.run(5)
    loop.guard.context.rate.set_multiplier(0.5)
    recorder_of(loop).record(replace(FAULT, place="elsewhere"), ("scale",), [0.1], FINDING, ranks=(1,), clock=(3, 1, 2))
    (record,) = loop.records
    assert (record.global_step, record.epoch, record.batch_idx) == (3, 1, 2)
    assert (record.fault, record.place, record.message, record.value) == ("mine", "elsewhere", "the loss is 7", 7.0)
    assert (record.remedies, record.lr_before, record.lr_after) == (("scale",), 0.1, 0.05)
    assert (record.cause, record.finding, record.ranks, record.applied) == ("dead_relu", FINDING, (1,), True)
    assert (record.snapshot_step, record.updates_lost) == (None, 0)


def test_a_record_says_what_a_restore_cost() -> None:
    """The step of the state gone back to, and the updates made since, the faulty one among them; none are lost where
    they were made again."""
    loop = PlainLoop()
    loop.run(20)
    snapshot = loop.guard.context.ring.certified[0]
    for words in (("restore",), ("restore", "redo")):
        recorder_of(loop).record(FAULT, words, [], restored=snapshot)
    assert [(one.snapshot_step, one.updates_lost) for one in loop.records] == [(16, 4), (16, 0)]


def test_an_update_is_undone_once() -> None:
    """A second rollback to the same snapshot undoes the updates since the first one, and one to an older snapshot also
    those before the first snapshot; what is resumed knows of the last rollback."""
    loop = PlainLoop()
    loop.run(20)
    certified = loop.guard.context.ring.certified
    recorder = recorder_of(loop)
    for step, depth in ((20, 0), (23, 0), (25, 1)):
        loop.step = step
        recorder.record(FAULT, ("restore",), [], restored=certified[depth])
        known, recorder = recorder.state_dict(), recorder_of(loop)
        recorder.load_state_dict(known)
    assert [one.snapshot_step for one in loop.records] == [16, 16, 12]
    assert [one.updates_lost for one in loop.records] == [4, 3, 2 + 4]


def test_the_error_that_ends_a_run_has_the_whole_context() -> None:
    """Why, where, the cause, what was tried before, which weights are there, and where more lie on the disk."""
    loop = PlainLoop()
    recorder = recorder_of(loop)
    recorder.on_disk = lambda: "checkpoint: good.ckpt"
    for kind in "abcdefghij":
        recorder.tried(Fault(kind, "batch", "loss"), ("restore", "scale"))
    with pytest.raises(TrainingDivergedError) as error:
        recorder.stop(FAULT, "the budget is used up", FINDING, (30, 2, 9), limit="max_rollbacks")
    head, where, why, tried, *rest = str(error.value).split("\n  ")
    assert head == "Training cannot go on: the budget is used up."
    assert (where, why) == (
        "where: step 30 (epoch 2, batch 9): the loss is 7 (mine, loss)",
        "why: dead_relu in layer 3: Lower the rate.",
    )
    assert tried.startswith("tried before: (the newest 8) c: restore, scale; d: restore, scale;")
    assert rest == [
        "weights: there is no good state to go back to",
        "limit: if the run should have gone on, raise Budget(max_rollbacks=…)",
        "checkpoint: good.ckpt",
    ]
    assert (error.value.fault, error.value.finding, len(error.value.tried)) == (FAULT, FINDING, 8)


def test_the_error_tells_what_was_done_before() -> None:
    """In a run: the skips before the stop, and the step of the weights left."""
    loop = PlainLoop(budget=Budget(max_bad_batches=32))
    with pytest.raises(TrainingDivergedError, match=r"(?s)tried before: .*: skip \(8 times\).* weights of step 8\n  l"):
        loop.run(60, nan_at(*range(12, 60)))


def test_the_last_error_names_the_surest_cause_of_such_faults() -> None:
    """A fault that was not looked into at the end does not hide what was found of those before it."""
    loop = PlainLoop()
    recorder = recorder_of(loop)
    sure, guess = replace(FINDING, cause="log_of_zero"), replace(FINDING, confidence=0.4)
    recorder.record(FAULT, ("skip",), [], sure)
    recorder.record(replace(FAULT, kind="another"), ("skip",), [], replace(FINDING, confidence=0.99))
    with pytest.raises(TrainingDivergedError, match=r"why: log_of_zero in layer 3") as error:
        recorder.stop(FAULT, "too many", guess, (1, 0, 1))
    assert error.value.finding == sure
    recorder.record(FAULT, ("skip",), [], replace(sure, cause="non_finite_input", samples=(3,)))
    with pytest.raises(TrainingDivergedError, match=r"why: dead_relu"):
        recorder.stop(FAULT, "too many", guess, (1, 0, 1))
    with pytest.raises(TrainingDivergedError, match=r"why: dead_relu"):
        recorder.stop(replace(FAULT, place="elsewhere"), "too many", None, (1, 0, 1))

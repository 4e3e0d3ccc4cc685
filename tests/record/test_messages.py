"""An intervention in words."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given

from lightning_nanguard.record.messages import (
    Thinning,
    describe_finding,
    origin_in_words,
    samples_in_words,
    tell,
    tell_again,
)
from lightning_nanguard.types import Finding, Intervention
from tests.record.data import ROLLBACK, SKIP, interventions, step

ROWS = Finding("non_finite_input", 1.0, {"times_met": 2.0}, "field 0", (4, 6), "Clean the data.", "batch", (100, "a"))
STREAM = replace(ROWS, samples=(4,), rows=(), evidence={"position": 12.0, "hash": "ab12", "rank": 1.0})
FINDING = Finding("non_finite_input", 1.0, {}, "input", (3, 17), "clean the data set")


@pytest.mark.parametrize(
    ("intervention", "done"),
    [
        (SKIP, "skipped the batch"),
        (ROLLBACK, "went back to step 400, learning rate 0.1 → 0.05"),
        (
            replace(ROLLBACK, remedies=("restore", "redo"), lr_after=0.1),
            "went back to step 400, made the updates since then again",
        ),
        (
            replace(SKIP, fault="healthy", place="", remedies=("give back",), lr_before=0.1, lr_after=0.2),
            "raised the learning rate again: 0.1 → 0.2",
        ),
        (
            replace(ROLLBACK, applied=False),
            "would have gone back to step 400, changed the learning rate 0.1 → 0.05",
        ),
        (
            replace(ROLLBACK, applied=False, lr_after=0.1),
            "would have gone back to step 400, changed the learning rate",
        ),
        (
            replace(ROLLBACK, lr_before=None, lr_after=None, snapshot_step=None),
            "went back to an earlier state, learning rate changed",
        ),
        (
            replace(ROLLBACK, remedies=("restore", "clip", "reset moments", "stop"), lr_after=0.1),
            ("went back to step 400, turned gradient clipping on, emptied the optimizer's state, stopped the run"),
        ),
        (replace(ROLLBACK, remedies=("reduce {momentum}",)), "reduce {momentum}, learning rate 0.1 → 0.05"),
        (replace(SKIP, remedies=()), "did nothing"),
        (replace(SKIP, remedies=(), applied=False), "would have done nothing"),
    ],
)
def test_what_was_done(intervention: Intervention, done: str) -> None:
    """Each remedy in words, in order, and how the rate changed."""
    assert f"\n  done: {done}\n" in f"{tell(intervention)}\n"
    assert tell_again(intervention).endswith(f" again; {done}")


@pytest.mark.parametrize(
    ("intervention", "text"),
    [
        (replace(ROLLBACK, value=12345.678), "step 430 (epoch 3, batch 30): exploding loss: 1.235e+04"),
        (replace(ROLLBACK, batch_idx=-1), "step 430 (epoch 3): exploding loss"),
        (
            replace(SKIP, place="", value=1.0, message="the norm is\n40 times the median. "),
            "step 412 (epoch 3, batch 12): non-finite gradient: the norm is 40 times the median",
        ),
    ],
)
def test_what_was_seen(intervention: Intervention, text: str) -> None:
    """Step, fault and place, with the message of the detector or else its number."""
    assert tell(intervention).split("\n")[0] == text


def test_a_finding_in_one_line() -> None:
    """Its cause, place, samples and suggestion, and how sure it is where this is asked for."""
    text = "non_finite_input in input (samples 3, 17): clean the data set"
    assert describe_finding(FINDING) == text
    assert describe_finding(FINDING, confidence=True) == f"{text} (confidence 1)"


def test_told_in_full() -> None:
    """What happened, why, what was done, and what to do: a line each, in words; what is not known has none."""
    finding = Finding(
        "non_finite_input", 1.0, {}, "field 0", (3, 17), "samples 3 and 17 hold 1.5e9. Clean the data. Or leave it out."
    )
    known = replace(SKIP, message="the gradient is\nnan.", cause="non_finite_input", finding=finding)
    assert tell(known).split("\n  ") == [
        "step 412 (epoch 3, batch 12): non-finite gradient (gradient of net.0.weight): the gradient is nan",
        "why: non-finite input in field 0: samples 3 and 17 hold 1.5e9",
        "done: skipped the batch",
        "to do: Clean the data. Or leave it out.",
    ]
    assert tell(replace(ROLLBACK, applied=False)).split("\n  ") == [
        "step 430 (epoch 3, batch 30): exploding loss",
        "why: not known (with observe=True no batch is run again)",
        "done: would have gone back to step 400, changed the learning rate 0.1 → 0.05",
    ]
    assert "why" not in tell(replace(SKIP, remedies=("hold rate",), applied=False))
    state = Finding("corrupted_state", 0.8, {}, "w", suggestion="w is far too large.", scope="state")
    assert tell(replace(ROLLBACK, finding=state)).endswith(
        "learning rate 0.1 → 0.05, in case the updates are the cause"
    )
    assert tell(replace(ROLLBACK, finding=state, remedies=("restore",), lr_after=0.1)).endswith("went back to step 400")
    restarted = replace(ROLLBACK, restart_updates=64, updates_lost=30)
    assert tell(restarted).split("\n  ")[1] == (
        "done: went on from a restart at step 400, which a trial had trained for 64 updates (30 updates undone), "
        "learning rate 0.1 → 0.05"
    )
    high = Finding("learning_rate_too_high", 0.9, {}, "loss", (), "the learning rate is 1. Lower it.")
    assert "why: learning rate too high: the learning rate is 1" in tell(replace(ROLLBACK, finding=high))
    assert "why: bad label" in tell(replace(SKIP, cause="bad_label"))
    short = Finding("bad_label", 1.0, {}, "x", (4,), "Clean it.")
    assert "why: bad label in x (sample 4): Clean it" in tell(replace(SKIP, finding=short))


def test_ranks() -> None:
    """Every text names the ranks that saw the fault, if not all did, and names none twice."""
    one, two = replace(SKIP, ranks=(1,)), replace(SKIP, ranks=(0, 2))
    assert tell(one).startswith(
        "step 412 (epoch 3, batch 12): non-finite gradient (gradient of net.0.weight) on rank 1"
    )
    assert tell_again(two) == "step 412 (epoch 3, batch 12): non-finite gradient on ranks 0, 2 again; skipped the batch"
    found = Finding("bad_label", 1.0, {"rank": 1.0}, samples=(4,), rows=(100,))
    assert tell_again(replace(one, finding=found)).count("on rank 1") == 1


def test_told_again() -> None:
    """Something that is back is told in one short line, with the samples."""
    known = replace(SKIP, finding=Finding("non_finite_input", 1.0, {}, "field 0", (3,), "Clean the data."))
    assert tell_again(known) == "step 412 (epoch 3, batch 12): non-finite gradient again (sample 3); skipped the batch"


@given(interventions)
def test_nothing_reaches_a_terminal_but_text(intervention: Intervention) -> None:
    """Whatever a record holds, what is shown of it has no control character and no more lines than it has parts."""
    for text in (tell(intervention), tell_again(intervention)):
        lines = text.split("\n  ")
        assert len(lines) <= 4
        assert text.startswith(f"step {intervention.global_step} (epoch {intervention.epoch}")
        assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize(
    ("evidence", "said"),
    [
        ({"lr": 0.1}, "Lower it. This run goes on at 0.05: use about this rate in the next one."),
        ({"lr": 0.1, "largest_rate": 0.06}, "This run goes on at 0.05: use about this rate in the next one."),
        ({"lr": 0.1, "tried_rate_factor": 0.4}, "This run goes on at 0.05: use about this rate in the next one."),
        ({"lr": 0.1, "largest_rate": 0.001}, "This run goes on at 0.05, and lowers the rate further if that is not"),
        ({}, "to do: Lower it."),
    ],
)
def test_the_rate_of_this_run_is_not_at_odds_with_the_finding(evidence: dict[str, float], said: str) -> None:
    """A rate is proposed for the next run only if the rate is to blame, and the present one is below the limit."""
    finding = Finding("learning_rate_too_high", 0.9, dict(evidence), "loss", suggestion="The rate is 0.1. Lower it.")
    told = tell(replace(ROLLBACK, finding=finding))
    assert said in told
    assert ("in the next one" in said) == ("in the next one" in told)
    assert "A trial" not in told
    kept = tell(replace(ROLLBACK, finding=finding, lr_after=0.1, remedies=("restore",)))
    assert ("to do: Lower it. A trial learned more at 0.04." in kept) == ("tried_rate_factor" in evidence)


def test_where_samples_came_from() -> None:
    """Rows where they are known, else place and hash; how often, and on which rank."""
    assert origin_in_words(ROWS) == "rows 100, a of the data set, seen up to 2 times"
    assert origin_in_words(STREAM) == "batch 12 of the epoch, hash ab12, on rank 1"
    assert samples_in_words(STREAM) == "sample 4, batch 12 of the epoch, hash ab12, on rank 1"
    assert origin_in_words(replace(STREAM, evidence={"position": 12.0, "hash": ""})) == "batch 12 of the epoch"
    assert origin_in_words(Finding("dead_relu", 1.0, {"hash": "of the user's own rule"})) == ""


def test_messages_name_the_rows() -> None:
    """The console says the rows the first time and again, and so does advice."""
    told = Intervention(7, 0, 7, "non_finite_loss", "loss", ("skip",), 0.1, 0.1, finding=ROWS)
    assert "\n  samples: rows 100, a of the data set, seen up to 2 times\n" in tell(told)
    assert "again (rows 100, a of the data set, seen up to 2 times); skipped" in tell_again(told)
    assert "(rows 100, a of the data set, seen up to 2 times)" in describe_finding(ROWS)


def test_all_of_them() -> None:
    """The first of a kind in full, each other one in one line, also stops of an observed run."""
    thinning = Thinning(everything=True)
    stops = [step(number, remedies=("stop",), applied=False) for number in range(3)]
    assert [thinning.shown(one) for one in stops] == [tell(stops[0]), *map(tell_again, stops[1:])]
    assert thinning.would_have_stopped


def test_few_of_many() -> None:
    """The count doubles from one that is shown to the next, for each kind apart."""
    thinning = Thinning(3)
    shown = [bool(thinning.shown(step(number))) for number in range(1, 13)]
    assert [number for number, one in enumerate(shown, start=1) if one] == [1, 2, 3, 6, 12]
    assert thinning.shown(step(13, fault="another")).count("\n") == 1

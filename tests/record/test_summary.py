"""The line at the end of a fit, and the message of the error that ends a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning_nanguard import Fault, Finding
from lightning_nanguard.record.summary import mostly_skipped, stop_message, summary


@pytest.mark.parametrize(
    ("text", "arguments", "options"),
    [
        ('1,200 updates watched (act_on="certain"), no interventions', (1200,), {}),
        ('1 update watched (act_on="certain"), no interventions', (1, {}, {}), {"path": "records.jsonl"}),
        (
            (
                '10 updates watched (act_on="evidence"), no interventions; '
                "the learning rate ends at 0.5 times its schedule"
            ),
            (10,),
            {"lr_multiplier": 0.5, "act_on": "evidence"},
        ),
        (
            (
                "10,000 updates watched, 1,004 interventions (gradient spike 1,001, collapsed 2, exploding loss "
                "1): 3 rollbacks, 1 change of the learning rate, 1,001 batches skipped; the learning rate ends at "
                "0.25 times its schedule; read more with: nanguard explain 'logs/run 7'"
            ),
            (
                10_000,
                {"exploding_loss": 1, "collapsed": 2, "gradient_spike": 1001},
                {"scale": 1, "restore": 3, "skip": 1001},
            ),
            {"lr_multiplier": 0.25, "path": Path("logs/run 7")},
        ),
        (
            ('5 updates watched (act_on="certain"), 1 fault found, only observed (spike 1); not done: 1 batch skipped'),
            (5, {"spike": 1}, {"skip": 1}),
            {"observe": True},
        ),
        (
            (
                '200 updates watched in this fit (act_on="certain"), no interventions; 1 trial held; '
                "in the whole run: 1,400 updates, 1 intervention; read more with: nanguard explain runs/7"
            ),
            (200,),
            {"whole": (1400, 1), "trials": "1 trial held", "path": "runs/7"},
        ),
        (
            '5 updates watched (act_on="certain"), 2 interventions (spike 2): 1 stop, 2 × reduce momentum',
            (5, {"spike": 2}, {"reduce momentum": 2, "stop": 1}),
            {},
        ),
        # A run stops once, also where the guard only observes.
        (
            (
                '5 updates watched (act_on="certain"), 5 faults found, only observed (spike 5); not done: 1 stop, '
                "2 rollbacks"
            ),
            (5, {"spike": 5}, {"restore": 2, "stop": 3}),
            {"observe": True},
        ),
    ],
)
def test_text(text: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """One line: how long was watched, for what the guard acts, what was met, what was done, where it is written."""
    assert summary(*arguments, **options) == f"NaNGuard: {text}".replace("watched,", 'watched (act_on="certain"),')


def test_a_run_that_skipped_most_updates_says_so_first() -> None:
    """The line begins with it and says what to do, unless nothing was skipped because the guard only observed."""
    told = summary(192, {"own": 191}, {"skip": 191}, path="runs/7")
    assert told.startswith("NaNGuard: 191 of 192 updates were skipped: almost nothing was learned. 192 updates watched")
    assert "; what to do: read why the first of them was skipped (nanguard explain). If the data are bad" in told
    assert "almost nothing" not in summary(192, {"own": 191}, {"skip": 191}, observe=True)


def test_the_causes_of_advice_are_named_once() -> None:
    """Advice is told of with and without interventions, each cause once."""
    assert summary(64, advice=["eval_mode", "dead_relu", "eval_mode"], path="runs/7").endswith(
        "no interventions; advice: dead relu, eval mode; read more with: nanguard explain runs/7"
    )
    assert "; advice: eval mode" in summary(64, {"non_finite_loss": 1}, {"skip": 1}, advice=["eval_mode"])


@pytest.mark.parametrize(
    ("skipped", "updates", "told"),
    [
        (191, 192, "191 of 192 updates were skipped: almost nothing was learned"),
        (100, 192, "100 of 192 updates were skipped: the run learned from less than half of its batches"),
        (250, 192, "192 of 192 updates were skipped: almost nothing was learned"),
        (95, 192, ""),
        (19, 19, ""),
        (0, 0, ""),
    ],
)
def test_the_share_of_skipped_updates(skipped: int, updates: int, told: str) -> None:
    """It is told from a half on, and after enough updates; steps that were trained twice make it no more than all."""
    assert mostly_skipped(skipped, updates) == told


FAULT = Fault("non_finite_loss", "batch", "loss", message="the loss\nis \x1b[2Jnan")


def test_equal_actions_are_counted() -> None:
    """What was done many times in a row is told once, with its count; what is not known is said."""
    tried = ["a: skip", "a: skip", "b: restore", "a: skip"]
    lines = stop_message("it is bad", FAULT, (9, 1, 2), tried=tried, snapshot_step=4).split("\n  ")
    assert lines == [
        "Training cannot go on: it is bad.",
        "where: step 9 (epoch 1, batch 2): the loss is \\x1b[2Jnan (non_finite_loss, loss)",
        "why: no cause was found. Try a lower learning rate, and look at the batch.",
        "tried before: a: skip (2 times); b: restore; a: skip",
        "weights: the module holds the weights of step 4",
    ]
    assert "tried before: nothing" in stop_message("it is bad", FAULT, (9, 1, 2))


def test_a_limit_is_named_if_it_ended_the_run() -> None:
    """No limit of the budget is proposed for a stop that no limit causes; the lines about files come last."""
    finding = Finding("log_of_zero", 0.9, place="training_step", suggestion="log was given zero. Add an epsilon.")
    told = stop_message(
        "too many", FAULT, (9, 1, 2), finding, limit="max_skip_share", on_disk="next: nanguard explain x"
    )
    assert "why: log_of_zero in training_step: log was given zero. Add an epsilon." in told
    assert told.endswith(
        "\n  limit: if the run should have gone on, raise Budget(max_skip_share=…)\n  next: nanguard explain x"
    )
    assert "Budget" not in stop_message("too many", FAULT, (9, 1, 2), finding)

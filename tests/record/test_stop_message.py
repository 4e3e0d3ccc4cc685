"""The message of the error that ends a run."""

from __future__ import annotations

from lightning_nanguard import Fault, Finding
from lightning_nanguard.record.stop_message import stop_message

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

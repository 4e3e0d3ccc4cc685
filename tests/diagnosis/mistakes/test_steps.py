"""Batches, losses, gradients and rates of the steps. Each mistake is named, and what is meant is not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_nanguard.diagnosis.mistakes.observation import Observation, ParameterSeen, RateSeen
from lightning_nanguard.diagnosis.mistakes.steps import (
    data_repeats,
    gradient_not_zeroed,
    learning_rate_zero,
    loss_without_graph,
    schedule_ended,
)
from tests.diagnosis.mistakes.seen import WELL, said


@pytest.mark.parametrize(
    ("seen", "place"),
    [
        (WELL, None),
        (replace(WELL, graphless=64), "loss"),
        (replace(WELL, graphless=32), None),
        (replace(WELL, losses=0), None),
        (replace(WELL, parameters=(ParameterSeen("net", gradient=False),)), "loss"),
        (replace(WELL, parameters=(ParameterSeen("net", gradient=False, moved=True),)), None),
        (replace(WELL, graphless=64, parameters=(ParameterSeen("net", moved=True),)), None),
        (replace(WELL, graphless=64, parameters=(ParameterSeen("net", trainable=False, moved=True),)), "loss"),
    ],
)
def test_loss_without_graph(seen: Observation, place: str | None) -> None:
    """Every loss lacks a graph; not one of several, and not where trained parameters change all the same."""
    assert said(loss_without_graph, seen) == place


@pytest.mark.parametrize(
    ("seen", "place"),
    [
        (WELL, None),
        (replace(WELL, added=3), None),
        (replace(WELL, added=4), "gradient"),
    ],
)
def test_gradient_not_zeroed(seen: Observation, place: str | None) -> None:
    """Gradients that are added to used ones several times in a row."""
    assert said(gradient_not_zeroed, seen) == place


@pytest.mark.parametrize(
    ("seen", "place"),
    [
        (WELL, None),
        (replace(WELL, distinct=1), "the training data"),
        (replace(WELL, distinct=4), "the training data"),
        (replace(WELL, distinct=7), None),
        (replace(WELL, batches=4, distinct=1), None),
    ],
)
def test_data_repeats(seen: Observation, place: str | None) -> None:
    """Many batches of one epoch that are the same; not a few, and not in a short epoch."""
    assert said(data_repeats, seen) == place


@pytest.mark.parametrize(
    ("seen", "place"),
    [
        (WELL, None),
        (replace(WELL, rates=(RateSeen(0, 0, 0.0, 0.0),)), "optimizer 0"),
        (replace(WELL, rates=(RateSeen(0, 0, 0.1, 0.1), RateSeen(1, 0, 0.0, 0.0))), "optimizer 1"),
        (replace(WELL, rates=(RateSeen(0, 0, 0.1, 0.1), RateSeen(0, 1, 0.0, 0.0))), None),
        (replace(WELL, rates=(RateSeen(0, 0, 0.1, 0.0),)), None),
        (replace(WELL, rates=(RateSeen(0, 0, 0.0, 0.0, moved=False),)), "optimizer 0"),
        (replace(WELL, rates=(RateSeen(0, 0, 0.0, 0.0, moved=True),)), None),
    ],
)
def test_learning_rate_zero(seen: Observation, place: str | None) -> None:
    """All groups of an optimizer at zero in every update; not one of several, not a warm-up, and not where the
    parameters change all the same."""
    assert said(learning_rate_zero, seen) == place


ENDED = (RateSeen(0, 0, 0.1, 1e-6),)


@pytest.mark.parametrize(
    ("seen", "place"),
    [
        (WELL, None),
        (replace(WELL, scheduled=True, rates=ENDED), "optimizer 0"),
        (replace(WELL, scheduled=True, rates=ENDED, expected=1000.0), "optimizer 0"),
        (replace(WELL, scheduled=True, rates=ENDED, expected=100.0), None),
        (replace(WELL, scheduled=False, rates=ENDED), None),
        (replace(WELL, scheduled=True, rates=(replace(ENDED[0], rose=True),)), None),
        (replace(WELL, scheduled=True, rates=(*ENDED, RateSeen(0, 1, 0.1, 0.05))), None),
    ],
)
def test_schedule_ended(seen: Observation, place: str | None) -> None:
    """A rate next to nothing with most of the run to come; not one that comes again, or ends with the run."""
    assert said(schedule_ended, seen) == place

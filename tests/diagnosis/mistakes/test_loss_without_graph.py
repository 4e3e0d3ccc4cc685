"""A loss that depends on nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_nanguard.diagnosis.mistakes.loss_without_graph import loss_without_graph
from lightning_nanguard.diagnosis.mistakes.observation import Observation, ParameterSeen
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
def test_it_is_named_and_what_is_meant_is_not(seen: Observation, place: str | None) -> None:
    """Every loss lacks a graph; not one of several, and not where trained parameters change all the same."""
    assert said(loss_without_graph, seen) == place

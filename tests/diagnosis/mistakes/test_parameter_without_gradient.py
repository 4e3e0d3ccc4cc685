"""Parameters that are run without gradients."""

from __future__ import annotations

import pytest

from lightning_nanguard.diagnosis.mistakes.observation import Observation
from lightning_nanguard.diagnosis.mistakes.parameter_without_gradient import parameter_without_gradient
from tests.diagnosis.mistakes.seen import WELL, body, said


@pytest.mark.parametrize(
    ("seen", "place"),
    [
        (WELL, None),
        (body(gradient=False, graph=False, untrained=True, moved=False), "body"),
        (body(gradient=False, graph=False, untrained=False, moved=False), None),
        (body(gradient=False, graph=False, untrained=True, moved=True), None),
        (body(gradient=False, graph=False, untrained=True, moved=None), None),
        (body(gradient=False, graph=False, untrained=True, moved=False, copy=True), None),
        (body(gradient=False, graph=False, untrained=True, moved=False, optimized=False), None),
        (body(gradient=False, graph=False, untrained=True, moved=False, ran=False), None),
        (body(gradient=False, graph=True, untrained=True, moved=False), None),
    ],
)
def test_it_is_named_and_what_is_meant_is_not(seen: Observation, place: str | None) -> None:
    """A part of the optimizer run under no_grad; not an average, a target, or weights of an earlier training."""
    assert said(parameter_without_gradient, seen) == place

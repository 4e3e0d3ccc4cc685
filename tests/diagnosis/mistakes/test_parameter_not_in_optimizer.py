"""Parameters that no optimizer has."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_nanguard.diagnosis.mistakes.observation import Observation
from lightning_nanguard.diagnosis.mistakes.parameter_not_in_optimizer import parameter_not_in_optimizer
from tests.diagnosis.mistakes.seen import BIAS, BODY, HEAD, WELL, body, said


@pytest.mark.parametrize(
    ("seen", "place"),
    [
        (WELL, None),
        (body(optimized=False, untrained=True), "body"),
        (body(optimized=False, untrained=False), None),
        (body(optimized=False, untrained=None), None),
        (body(optimized=False, untrained=True, moved=True), None),
        (body(optimized=False, untrained=True, gradient=False), None),
        (replace(body(optimized=False, untrained=True), unfreezes=True), None),
        (replace(WELL, parameters=(replace(BODY, optimized=False, untrained=True), BIAS, HEAD)), "body.0.weight"),
    ],
)
def test_it_is_named_and_what_is_meant_is_not(seen: Observation, place: str | None) -> None:
    """A part that gets gradients and is in no optimizer; not one without gradients, or trained before."""
    assert said(parameter_not_in_optimizer, seen) == place

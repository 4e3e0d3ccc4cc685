"""Parts whose result goes on without its graph."""

from __future__ import annotations

import pytest

from lightning_nanguard.diagnosis.mistakes.detached_part import detached_part
from lightning_nanguard.diagnosis.mistakes.observation import Observation
from tests.diagnosis.mistakes.seen import WELL, body, said


@pytest.mark.parametrize(
    ("seen", "place"),
    [
        (WELL, None),
        (body(gradient=False, cut=True), "body"),
        (body(gradient=False), None),
        (body(cut=True), None),
        (body(gradient=False, cut=True, copy=True), None),
        (body(gradient=False, cut=True, untrained=False), None),
        (body(gradient=False, cut=True, optimized=False), None),
    ],
)
def test_it_is_named_and_what_is_meant_is_not(seen: Observation, place: str | None) -> None:
    """A part of the optimizer whose result is used without its graph; not one whose result is not used."""
    assert said(detached_part, seen) == place

"""Dropout in evaluation mode."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_nanguard.diagnosis.mistakes.dropout_off import dropout_off
from lightning_nanguard.diagnosis.mistakes.observation import Observation
from tests.diagnosis.mistakes.seen import WELL, said


@pytest.mark.parametrize(
    ("seen", "place"),
    [
        (WELL, None),
        (replace(WELL, modes=(WELL.modes[0], replace(WELL.modes[1], training=False))), "body.2"),
        (replace(WELL, modes=(WELL.modes[0], replace(WELL.modes[1], training=False, within="body"))), None),
        (replace(WELL, modes=(replace(WELL.modes[0], training=False), WELL.modes[1])), None),
        (replace(WELL, modes=(replace(WELL.modes[1], training=False),), evaluating=True), None),
    ],
)
def test_it_is_named_and_what_is_meant_is_not(seen: Observation, place: str | None) -> None:
    """Dropout alone in evaluation mode; not with all that is around it, and not batch norm."""
    assert said(dropout_off, seen) == place

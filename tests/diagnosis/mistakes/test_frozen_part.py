"""Parts that are frozen as they were initialised."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_nanguard.diagnosis.mistakes.frozen_part import frozen_part
from lightning_nanguard.diagnosis.mistakes.observation import Observation
from tests.diagnosis.mistakes.seen import BIAS, BODY, HEAD, WELL, body, said


@pytest.mark.parametrize(
    ("seen", "place"),
    [
        (WELL, None),
        (body(trainable=False, optimized=False, gradient=False, untrained=True), "body"),
        (body(trainable=False, optimized=False, gradient=False, untrained=False), None),
        (body(trainable=False, optimized=True, gradient=False, untrained=True), None),
        (body(trainable=False, optimized=False, gradient=False, untrained=True, ran=False), None),
        (body(trainable=False, optimized=False, gradient=False, untrained=True, copy=True), None),
        (body(trainable=False, optimized=False, gradient=False, untrained=True, moved=True), None),
        (replace(body(trainable=False, optimized=False, gradient=False, untrained=True), unfreezes=True), None),
        (
            replace(
                WELL,
                parameters=(
                    replace(BODY, trainable=False, optimized=False, gradient=False, untrained=True),
                    replace(BIAS, name="body.1.adapter"),
                    HEAD,
                ),
            ),
            None,
        ),
    ],
)
def test_it_is_named_and_what_is_meant_is_not(seen: Observation, place: str | None) -> None:
    """A frozen part that looks untrained; not one trained before, to be unfrozen, not run, or beside adapters."""
    assert said(frozen_part, seen) == place

"""Parts in evaluation mode. Each mistake is named, and what is meant is not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_nanguard.diagnosis.mistakes.modes import dropout_off, eval_mode
from lightning_nanguard.diagnosis.mistakes.observation import Observation
from tests.diagnosis.mistakes.seen import WELL, body, said

EVALUATED = tuple(replace(one, training=False, within="body") for one in WELL.modes)


@pytest.mark.parametrize(
    ("seen", "place"),
    [
        (WELL, None),
        (replace(WELL, modes=EVALUATED, evaluating=True), "the module"),
        (replace(WELL, modes=EVALUATED), "body"),
        (replace(WELL, modes=EVALUATED[:1]), None),
        (replace(body(untrained=True), modes=EVALUATED[:1]), "body"),
        (replace(body(gradient=False), modes=EVALUATED), None),
        (replace(WELL, modes=(replace(EVALUATED[1], within="body.2"),)), None),
    ],
)
def test_eval_mode(seen: Observation, place: str | None) -> None:
    """The whole module, or a trained part with dropout; not an untrained part, nor batch norm of a trained one."""
    assert said(eval_mode, seen) == place


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
def test_dropout_off(seen: Observation, place: str | None) -> None:
    """Dropout alone in evaluation mode; not with all that is around it, and not batch norm."""
    assert said(dropout_off, seen) == place

"""Training in evaluation mode."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_nanguard.diagnosis.mistakes.eval_mode import eval_mode
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
def test_it_is_named_and_what_is_meant_is_not(seen: Observation, place: str | None) -> None:
    """The whole module, or a trained part with dropout; not an untrained part, nor batch norm of a trained one."""
    assert said(eval_mode, seen) == place

"""How deep a rollback goes."""

from __future__ import annotations

import pytest

from lightning_nanguard.decide.depth import depth_by_level
from lightning_nanguard.types import Evidence


@pytest.mark.parametrize(
    ("levels", "depth", "keeps", "expected"),
    [
        ((0.5, 0.5, 0.5), 0, True, 0),
        ((2.0, 0.5, 0.5), 0, True, 1),
        ((2.0, 0.5, 0.5), 2, True, 2),
        ((0.5, 0.5, 2.2), 2, True, 1),
        ((0.5, 0.5, 2.2), 2, False, 2),
        ((None, None), 1, True, 1),
        ((0.5,), 7, True, 0),
    ],
    ids=["equal", "a newer one is worse", "asked for", "half is kept", "not kept", "no level known", "no deeper one"],
)
def test_depth_by_level(levels: tuple[float | None, ...], depth: int, keeps: bool, expected: int) -> None:
    """At least the depth asked for, deeper while the level is clearly worse, and short of losing half of what was
    learned."""
    evidence = Evidence(step=1, first=2.3, loss_unit=2.3, levels=levels)
    assert depth_by_level(depth, evidence, same_level=0.1, keeps=keeps) == expected

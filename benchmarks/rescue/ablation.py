"""The guard without one of its rules at a time: what each of them earns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, final
from unittest.mock import patch

from lightning_nanguard import ClipGradients, DivergingLoss, GradientSpike, NaNGuard, NonFinite, ReduceLR, Rollback

from .cases import Case
from .contenders import CONTENDERS, MODES, Attempt, Contender, attempt_with

Replaced = Sequence[tuple[str, Any]]


@final
class Without(Contender):
    """The guard without a rule.

    Args:
        name: What is left out.
        make: Makes the guard.
        replaced: What stands in for a part of it while it runs: dotted names and values.
    """

    def __init__(self, name: str, make: Callable[[], NaNGuard] = NaNGuard, replaced: Replaced = ()) -> None:
        self.name = self.title = f"no {name}"  # type: ignore[misc]
        self._make = make
        self._replaced = replaced

    def attempt(self, case: Case) -> Attempt:
        with ExitStack() as stack:
            for place, value in self._replaced:
                stack.enter_context(patch(f"lightning_nanguard.{place}", value))
            return attempt_with(self._make(), case)


def _nothing(*_: Any, **__: Any) -> None:
    return None


ABLATIONS: dict[str, Contender] = {
    c.name: c
    for c in (
        Without("rehearsal", lambda: NaNGuard(remedies=[Rollback(), ClipGradients(), ReduceLR(rehearse=False)])),
        Without("review", replaced=[("rehearsal.Rehearsal.review", lambda self: 1.0)]),
        Without("clipping", lambda: NaNGuard(remedies=[Rollback(), ReduceLR()])),
        Without("cut", lambda: NaNGuard(remedies=[Rollback(), ClipGradients()])),
        Without("spikes", lambda: NaNGuard(detectors=[NonFinite(), DivergingLoss()])),
        Without("divergence", lambda: NaNGuard(detectors=[NonFinite(), GradientSpike()])),
        Without("comparison", replaced=[("investigate.Investigator._compare", _nothing)]),
        Without("strange batches", replaced=[("state.batch_history.BatchHistory.strange", _nothing)]),
        Without("plausibility", replaced=[("state.plausibility.first_jump", _nothing)]),
        Without("start kept", replaced=[("engine._EARLY", 0)]),
        Without("growth", replaced=[("investigate.Investigator._growth", lambda self, since=None: 1.0)]),
        Without("overshoot", replaced=[("detectors.DivergingLoss._behind", math.inf)]),
        Without("by heart", replaced=[("remedies._BY_HEART", -1.0)]),
        Without(
            "depth by level",
            replaced=[("policy._by_level", lambda depth, evidence, keeps: min(depth, max(0, evidence.snapshots - 1)))],
        ),
    )
}
"""By name: the guard as it is, but for one rule."""

EVERYONE: dict[str, Contender] = CONTENDERS | MODES | ABLATIONS

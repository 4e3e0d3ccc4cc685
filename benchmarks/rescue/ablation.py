"""The guard without one of its rules at a time: what each of them earns."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, final
from unittest.mock import patch

from lightning_nanguard import ClipGradients, DivergingLoss, GradientSpike, NaNGuard, NonFinite, ReduceLR, Rollback
from lightning_nanguard.thresholds import Thresholds
from lightning_nanguard.types import Evidence

from .arc import Arc
from .cases import Case
from .contenders import CONTENDERS, MODES, Attempt, Contender, attempt_with

Change = dict[str, Any]
"""New values of thresholds, by their path: ``{"snapshots.ring.keep_start": 0}``."""


def changed(thresholds: Any, changes: Change) -> Any:
    """Thresholds with other values."""
    for path, value in changes.items():
        name, _, rest = path.partition(".")
        part = changed(getattr(thresholds, name), {rest: value}) if rest else value
        thresholds = replace(thresholds, **{name: part})
    return thresholds


@final
class Without(Contender):
    """The guard without a rule.

    Args:
        name: What is left out.
        make: Makes the guard.
        change: Thresholds under which the rule never applies.
        replaced: Functions that stand in for a part of the guard while it runs, by dotted name: for what has no
            threshold.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], NaNGuard] | None = None,
        change: Change | None = None,
        replaced: dict[str, Callable[..., Any]] | None = None,
    ) -> None:
        self.name = self.title = f"no {name}"  # type: ignore[misc]
        thresholds = changed(Thresholds(), change or {})
        self._make = make or (lambda: NaNGuard(act_on="evidence", thresholds=thresholds))
        self._replaced = replaced or {}

    def attempt(self, case: Case) -> Attempt:
        with ExitStack() as stack:
            for place, function in self._replaced.items():
                stack.enter_context(patch(f"lightning_nanguard.{place}", function))
            return attempt_with(self._make(), case)


def _guard(**arguments: Any) -> NaNGuard:
    return NaNGuard(act_on="evidence", **arguments)


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _as_asked(depth: int, evidence: Evidence, **_: Any) -> int:
    return min(depth, max(0, len(evidence.levels) - 1))


ABLATIONS: dict[str, Contender] = {
    c.name: c
    for c in (
        Without("rehearsal", lambda: _guard(remedies=[Rollback(), ClipGradients(), ReduceLR(rehearse=False)])),
        Without("review", replaced={"guard.rehearsal.Rehearsal.review": lambda self, untrained, *, at_most: 1.0}),
        Without("try of a rate given back", replaced={"guard.rehearsal.Rehearsal.harmful": lambda self, factor: False}),
        Without("clipping", lambda: _guard(remedies=[Rollback(), ReduceLR()])),
        Without("cut", lambda: _guard(remedies=[Rollback(), ClipGradients()])),
        Without("spikes", lambda: _guard(detectors=[NonFinite(), DivergingLoss()])),
        Without("divergence", lambda: _guard(detectors=[NonFinite(), GradientSpike()])),
        Without("comparison", replaced={"guard.investigator.Investigator._compare": _nothing}),
        Without("strange batches", change={"batches.healthy.strange_factor": math.inf}),
        Without("plausibility", replaced={"state.plausibility.first_jump": _nothing}),
        Without("start kept", change={"snapshots.ring.keep_start": 0}),
        Without("depth by level", replaced={"decide.policy.depth_by_level": _as_asked}),
    )
}
"""By name: the guard on evidence, but for one rule."""

EVERYONE: dict[str, Contender] = CONTENDERS | MODES | {Arc.name: Arc()} | ABLATIONS

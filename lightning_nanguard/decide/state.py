"""The state that the policy keeps from one decision to the next."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, final


@final
@dataclass(frozen=True, slots=True)
class PolicyState:
    """The state that the policy keeps between decisions, in plain tuples and numbers.

    Attributes:
        attempt: Number of the attempt against a diverged learner; 0 at first.
        learner_step: Step of the last plan for a diverged learner, ``-1`` without one.
        restores: ``(step, fault and place)`` of the restores within the budget's window.
        skips: Steps of the skips within the budget's window.
        bad_rate: Lowest effective learning rate at which the learner diverged; ``inf`` if it never did.
        proven_rate: Highest effective learning rate at which a snapshot was certified while the loss was falling, kept
            below ``bad_rate``.
        failed_returns: How often the learner diverged again after a cut was given back.
        given_back_at: Number of healthy updates at the last change of the multiplier.
        unproven: Fault and place of each rollback since a snapshot was last certified.
        trials_confirmed: Number of trials in a row that confirmed a suspicion.
        proven_level: Level of the loss at the last proof of a rate; ``inf`` before.
    """

    attempt: int = 0
    learner_step: int = -1
    restores: tuple[tuple[int, str], ...] = ()
    skips: tuple[int, ...] = ()
    bad_rate: float = math.inf
    proven_rate: float = 0.0
    failed_returns: int = 0
    given_back_at: int = 0
    proven_level: float = math.inf
    unproven: tuple[str, ...] = ()
    trials_confirmed: int = 0

    def restored(self, step: int, where: str) -> PolicyState:
        """The state after a restore because of a fault, which is not proven to have helped yet."""
        return replace(self, restores=(*self.restores, (step, where)), unproven=(*self.unproven, where))

    def restores_of(self, where: str) -> int:
        """Number of restores because of a fault at a place."""
        return sum(place == where for _, place in self.restores)

    def to_dict(self) -> dict[str, Any]:
        """Plain containers for a checkpoint."""
        return {
            **asdict(self),
            "restores": [list(item) for item in self.restores],
            "skips": list(self.skips),
            "unproven": list(self.unproven),
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> PolicyState:
        """The inverse of :meth:`to_dict`. Entries of another version of the guard are left out."""
        restores = tuple((int(step), str(place)) for step, place in state["restores"])
        skips, unproven = (tuple(state.get(name, ())) for name in ("skips", "unproven"))
        known = {one.name: state[one.name] for one in fields(cls) if one.name in state}
        return cls(**{**known, "restores": restores, "skips": skips, "unproven": unproven})


def within_window(state: PolicyState, oldest: int) -> PolicyState:
    """The state without restores and skips of step ``oldest`` and before."""
    restores = tuple(item for item in state.restores if item[0] > oldest)
    skips = tuple(step for step in state.skips if step > oldest)
    if len(restores) == len(state.restores) and len(skips) == len(state.skips):
        return state
    return replace(state, restores=restores, skips=skips)

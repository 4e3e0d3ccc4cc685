"""How ``nanguard check`` tries whether a model can learn."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckThresholds:
    """How ``nanguard check`` tries whether a model can learn a few samples by heart; no guard of a run uses it.

    Attributes:
        samples: Samples of the first batch that the costly checks use; few, since both run many passes.
        overfit_updates: Updates in which a model has to learn them.
        learned_share: They are learned where the loss falls below this share of the first one.
        stuck_share: They are not learned where the loss stays above this share of the first one; between both, partly.
        enough_share: Below this share of the first loss there is nothing left to try.
        adam_rates: Learning rates of Adam tried after the optimizer as configured, from the usual one upwards.
    """

    samples: int = 8
    overfit_updates: int = 200
    learned_share: float = 0.2
    stuck_share: float = 0.8
    enough_share: float = 0.01
    adam_rates: tuple[float, ...] = (1e-3, 1e-2)


CHECK = CheckThresholds()
"""The values the command uses."""

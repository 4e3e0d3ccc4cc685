"""How ``nanguard check`` tests whether a model can learn."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckThresholds:
    """How ``nanguard check`` tests whether a model can learn a few samples by heart. ``NaNGuard`` does not use it.

    Attributes:
        samples: Samples of the first batch that the expensive checks use. They are few, because these checks run many
            passes.
        overfit_updates: Updates in which a model has to learn these samples.
        learned_share: The samples are learned if the loss falls below this share of the first loss.
        stuck_share: The samples are not learned if the loss stays above this share of the first loss. Between the two
            shares they are partly learned.
        enough_share: Share of the first loss below which no further learning rate is tried.
        adam_rates: Learning rates of Adam that are tried after the optimizer as configured, from the usual rate upward.
    """

    samples: int = 8
    overfit_updates: int = 200
    learned_share: float = 0.2
    stuck_share: float = 0.8
    enough_share: float = 0.01
    adam_rates: tuple[float, ...] = (1e-3, 1e-2)


CHECK = CheckThresholds()
"""The values the command uses."""

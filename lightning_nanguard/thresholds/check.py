"""How ``nanguard check`` tests whether a model can learn, and whether its gradients are right. A guard uses neither."""

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


@dataclass(frozen=True)
class GradientCheckThresholds:
    """How gradients are compared with finite differences.

    Attributes:
        max_parameters: Parameters that are checked; each takes two forward passes for each direction.
        directions: Random directions that are compared; a wrong gradient may be right along one of them.
        difference: Size of the first finite difference, in double precision.
        differences: Number of sizes that are tried, each a tenth of the one before. A kink between the two points gives
            a wrong difference, and a smaller size avoids it.
        close: Relative difference below which no further size is tried.
        rounding: Relative difference of two losses that rounding alone may cause.
        gradcheck_tolerance: Absolute tolerance of ``torch.autograd.gradcheck``.
        gradcheck_nondeterminism: Difference between two backward passes that it tolerates.
        gradcheck_error: Relative difference that is reported for a custom function that ``gradcheck`` refuses.
    """

    max_parameters: int = 200
    directions: int = 2
    difference: float = 1e-5
    differences: int = 3
    close: float = 0.01
    rounding: float = 1e-13
    gradcheck_tolerance: float = 1e-4
    gradcheck_nondeterminism: float = 1e-9
    gradcheck_error: float = 0.1


GRADIENTS = GradientCheckThresholds()
"""The values the command uses for gradients."""

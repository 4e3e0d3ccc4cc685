"""From evidence to findings: one pure function for each cause, no torch.

A rule is given a :class:`~lightning_nanguard.diagnosis.clues.Case` and says ``Finding`` or nothing; it says nothing
where its part of the evidence is missing. To add a cause, write its function and enter it in :data:`RULES`. The
identifiers of the causes are part of the records.
"""

from __future__ import annotations

from collections.abc import Callable

from lightning_nanguard.diagnosis.clues import Case
from lightning_nanguard.diagnosis.rules.arithmetic import (
    division_by_zero,
    exp_overflow,
    log_of_zero,
    low_precision_overflow,
    sqrt_at_zero,
)
from lightning_nanguard.diagnosis.rules.course import (
    batch_size,
    layer_update_abnormal,
    local_minimum,
    oscillation,
    saddle_point,
)
from lightning_nanguard.diagnosis.rules.data import non_finite_input, target_out_of_domain, unnormalised_input
from lightning_nanguard.diagnosis.rules.learning import (
    collapsed,
    corrupted_state,
    exploding_gradient,
    ill_conditioned,
    learning_rate_too_high,
)
from lightning_nanguard.diagnosis.rules.model import (
    dead_relu,
    double_softmax,
    mse_for_classification,
    saturated_activation,
    unbalanced_initialisation,
    vanishing_gradient,
    wrong_gradient,
)
from lightning_nanguard.types import Finding

Rule = Callable[[Case], Finding | None]

RULES: tuple[Rule, ...] = (
    non_finite_input,
    target_out_of_domain,
    unnormalised_input,
    log_of_zero,
    exp_overflow,
    division_by_zero,
    sqrt_at_zero,
    low_precision_overflow,
    corrupted_state,
    exploding_gradient,
    learning_rate_too_high,
    double_softmax,
    mse_for_classification,
    unbalanced_initialisation,
    saturated_activation,
    dead_relu,
    vanishing_gradient,
    wrong_gradient,
    ill_conditioned,
    collapsed,
    layer_update_abnormal,
    oscillation,
    saddle_point,
    local_minimum,
    batch_size,
)
"""Every rule, in the order that settles a tie."""


def findings(case: Case) -> tuple[Finding, ...]:
    """Every finding, the surest first; of equally sure ones that of the earlier rule."""
    found = [finding for rule in RULES if (finding := rule(case)) is not None]
    return tuple(sorted(found, key=lambda finding: -finding.confidence))


def diagnose(case: Case) -> Finding | None:
    """The surest finding, ``None`` where no rule has one.

    Example:
        >>> from lightning_nanguard.events import Fault
        >>> from lightning_nanguard.policy import Evidence
        >>> diagnose(Case(Fault("non_finite_loss", "batch", "loss"), Evidence(step=3, batch_finite=False))).cause
        'non_finite_input'
    """
    return next(iter(findings(case)), None)

"""Rules that judge evidence and return findings: one pure function for each cause, without torch.

A rule takes a :class:`~lightning_nanguard.Case` and returns a :class:`~lightning_nanguard.Finding`, or ``None`` if it
does not apply or its part of the case is missing. A rule of your own is any callable that does the same. Give it to
``NaNGuard(rules=[…])``. The guard calls it together with the built-in ones: at every fault, before the first step
(``preflight=True``) and in an examination of the run. It records the finding with the highest confidence.

Example:
    >>> from lightning_nanguard import Case, Evidence, Fault, Finding
    >>> from lightning_nanguard.diagnosis.rule_set import RuleSet
    >>> def zero_rate(case: Case) -> Finding | None:
    ...     if case.evidence.lr is None or case.evidence.lr > 0.0:
    ...         return None
    ...     return Finding("zero_rate", 0.6, {"lr": case.evidence.lr}, suggestion="Look at the learning rate schedule.")
    >>> case = Case(Fault("stuck_loss", "learner", "loss", certain=False, proof="trial"), Evidence(step=9, lr=0.0))
    >>> [finding.cause for finding in RuleSet([zero_rate]).findings(case)]
    ['zero_rate']

A built-in rule is listed in :data:`RULES` and has a row in the tests of its file. It takes
:class:`~lightning_nanguard.thresholds.DiagnosisThresholds` as a second argument. The identifiers of the causes are part
of the records.
"""

from __future__ import annotations

from collections.abc import Callable

from lightning_nanguard.diagnosis.case import Case
from lightning_nanguard.diagnosis.rules.arithmetic import (
    division_by_zero,
    exp_overflow,
    log_of_zero,
    low_precision_overflow,
    non_finite_from_start,
    random_draw,
    sqrt_at_zero,
    unknown_operation,
)
from lightning_nanguard.diagnosis.rules.data import (
    labels_unrelated,
    no_valid_target,
    non_finite_input,
    target_out_of_domain,
    unnormalised_input,
)
from lightning_nanguard.diagnosis.rules.layers import (
    dead_relu,
    saturated_activation,
    unbalanced_initialisation,
    vanishing_gradient,
)
from lightning_nanguard.diagnosis.rules.learner import (
    collapsed,
    corrupted_state,
    exploding_gradient,
    ill_conditioned,
    learning_rate_too_high,
    unstable_hyperparameter,
)
from lightning_nanguard.diagnosis.rules.loss_function import (
    double_softmax,
    mse_for_classification,
    unbounded_loss,
    wrong_gradient,
)
from lightning_nanguard.diagnosis.rules.plateau import (
    batch_size,
    layer_update_abnormal,
    local_minimum,
    oscillation,
    saddle_point,
)
from lightning_nanguard.diagnosis.rules.updates import forward_writes_buffer, optimizer_update
from lightning_nanguard.thresholds.diagnosis import DEFAULT, DiagnosisThresholds
from lightning_nanguard.types import Finding

RULES: tuple[Callable[[Case, DiagnosisThresholds], Finding | None], ...] = (
    non_finite_input,
    target_out_of_domain,
    no_valid_target,
    labels_unrelated,
    unnormalised_input,
    log_of_zero,
    exp_overflow,
    division_by_zero,
    sqrt_at_zero,
    low_precision_overflow,
    random_draw,
    non_finite_from_start,
    optimizer_update,
    forward_writes_buffer,
    corrupted_state,
    exploding_gradient,
    unstable_hyperparameter,
    learning_rate_too_high,
    double_softmax,
    mse_for_classification,
    unbounded_loss,
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
    unknown_operation,
)
"""Every built-in rule. Of two findings with the same confidence, that of the earlier rule is used."""


def findings(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> tuple[Finding, ...]:
    """All findings of the built-in rules, those with the highest confidence first; ties in the order of the rules."""
    found = [finding for rule in RULES if (finding := rule(case, thresholds)) is not None]
    return tuple(sorted(found, key=lambda finding: -finding.confidence))


def diagnose(case: Case, thresholds: DiagnosisThresholds = DEFAULT) -> Finding | None:
    """The finding of the built-in rules with the highest confidence, ``None`` if no rule has one.

    Example:
        >>> from lightning_nanguard.types import Evidence, Fault
        >>> diagnose(Case(Fault("non_finite_loss", "batch", "loss"), Evidence(step=3, batch_finite=False))).cause
        'non_finite_input'
    """
    return next(iter(findings(case, thresholds)), None)

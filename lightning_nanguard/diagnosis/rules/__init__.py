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
from lightning_nanguard.diagnosis.rules import (
    arithmetic,
    data,
    layers,
    learner,
    loss_function,
    plateau,
    state,
    unexplained,
)
from lightning_nanguard.thresholds.diagnosis import DiagnosisThresholds
from lightning_nanguard.types import Finding

RULES: tuple[Callable[[Case, DiagnosisThresholds], Finding | None], ...] = (
    data.non_finite_input,
    data.target_out_of_domain,
    data.no_valid_target,
    data.labels_unrelated,
    data.unnormalised_input,
    arithmetic.log_of_zero,
    arithmetic.exp_overflow,
    arithmetic.division_by_zero,
    arithmetic.sqrt_at_zero,
    arithmetic.low_precision_overflow,
    arithmetic.random_draw,
    arithmetic.non_finite_from_start,
    state.optimizer_update,
    state.forward_writes_buffer,
    state.corrupted_state,
    learner.exploding_gradient,
    learner.unstable_hyperparameter,
    learner.learning_rate_too_high,
    loss_function.double_softmax,
    loss_function.mse_for_classification,
    loss_function.unbounded_loss,
    layers.unbalanced_initialisation,
    layers.saturated_activation,
    layers.dead_relu,
    layers.vanishing_gradient,
    loss_function.wrong_gradient,
    learner.ill_conditioned,
    learner.collapsed,
    plateau.layer_update_abnormal,
    plateau.oscillation,
    plateau.saddle_point,
    plateau.local_minimum,
    plateau.batch_size,
    arithmetic.unknown_operation,
    unexplained.changed_gradient,
    unexplained.unexplained,
)
"""Every built-in rule. Of two findings with the same confidence, that of the earlier rule is used."""

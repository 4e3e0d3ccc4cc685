"""Examines a finite run that does not learn: its layers, its gradients, and the curvature of its loss."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import final

import torch
from torch import Tensor

from lightning_nanguard.detect.history import ReadingHistory
from lightning_nanguard.diagnosis.batch import batch_clues, samples
from lightning_nanguard.diagnosis.case import Case, Curvature, Layer, Model, Objective
from lightning_nanguard.diagnosis.course import Course, LossProgress
from lightning_nanguard.diagnosis.curvature import (
    Hessian,
    Vector,
    curvature_along_update,
    dot,
    extreme_eigenvalues,
    gradient_of,
    norm,
    update_direction,
    values_kept,
)
from lightning_nanguard.diagnosis.isolation import Untraced, errors_logged, isolated
from lightning_nanguard.diagnosis.label_relation import label_relation
from lightning_nanguard.diagnosis.layers import measure_layers
from lightning_nanguard.diagnosis.module_state import trained_parameters
from lightning_nanguard.diagnosis.rule_set import RuleSet
from lightning_nanguard.state.batch_history import MicroBatch
from lightning_nanguard.state.learner import Learner
from lightning_nanguard.thresholds.diagnosis import DiagnosisThresholds
from lightning_nanguard.types import Evidence, Finding

_logger = logging.getLogger("lightning_nanguard")


@final
class Examination:
    """Finds out why a loss does not move. It undoes everything that its runs change.

    Args:
        learner: The learner.
        step: Runs a micro-batch forward with its recorded random numbers. ``step(micro, full_precision)`` returns the
            loss with its graph, or ``None``.
        untraced: A context that undoes what a run changes.
        patience: Number of updates within which the loss has to move. With ``None`` it examines only on request.
        rules: The rules.
        thresholds: When a number is evidence for a cause, and how many batches are used.
    """

    def __init__(
        self,
        learner: Learner,
        step: Callable[[MicroBatch, bool], Tensor | None],
        untraced: Untraced,
        patience: int | None,
        *,
        rules: RuleSet,
        thresholds: DiagnosisThresholds,
    ) -> None:
        self._learner = learner
        self._step = step
        self._untraced = untraced
        self._rules = rules
        self._thresholds = thresholds
        self._progress = (
            None if patience is None else LossProgress(patience, thresholds.examination, thresholds.plateau)
        )
        self._scipy_missed = False

    def due(self, updates: int, history: ReadingHistory, *, asked: bool = False) -> Course | None:
        """The course of the loss if an examination is due now; ``None`` otherwise."""
        progress = self._progress
        if progress is not None and progress.due(updates):
            progress.take_level(updates, history)
            course = progress.course(updates, history)
            if course is not None and progress.stuck(updates, course):
                return course
        if not asked:
            return None
        recent = LossProgress.of(history, self._thresholds.examination) if progress is None else progress
        return recent.course(updates, history)

    def findings(
        self, micros: Sequence[MicroBatch], course: Course, evidence: Evidence, *, asked: bool = False
    ) -> tuple[Finding, ...]:
        """Findings, those with the highest confidence first. It never raises.

        A loss that has settled at a low level is no problem, unless the user asked.
        """
        with errors_logged("the run could not be examined"):
            case = self.case(micros, course, evidence)
            high = case.course is not None and case.course.high(self._thresholds.plateau)
            # These two matter at any level: a lower rate or a larger batch would lower the loss further.
            return tuple(
                one for one in self._rules.findings(case) if high or asked or one.cause in ("oscillation", "batch_size")
            )
        return ()

    def case(self, micros: Sequence[MicroBatch], course: Course, evidence: Evidence) -> Case:
        """Collect the case of a run for the rules.

        Args:
            micros: The micro-batches of the last updates, the newest last.
            course: The course of its loss.
            evidence: The guard's counts.

        Raises:
            ValueError: If no batch can be run again.
        """
        if not micros:
            raise ValueError("Examination.case(micros=()): at least one batch is needed.")
        limits, module, newest = self._thresholds, self._learner.module, micros[-1]
        step = partial(self._step, newest, True)
        clues = batch_clues(newest.batch, module, limits.data, count=newest.drawn)
        if course.high(limits.plateau):
            clues = replace(clues, labels=label_relation([micro.batch for micro in micros], limits.labels))
        case = Case(evidence=evidence, clues=clues, course=course)
        model = measure_layers(module, newest.batch, step, self._untraced, limits.layers)
        model = None if model is None else replace(model, updates=evidence.step)
        course = replace(course, chance=None if model is None else _chance_level(model.objective))
        if len(self._learner.optimizers) != 1:
            return replace(case, model=model, course=course)
        course = replace(course, lr=evidence.lr, batch_size=samples(newest.batch))
        named = trained_parameters(module)
        with isolated(self._untraced):
            course = self._compare_gradients(micros, course, list(named.values()))
        with isolated(self._untraced):
            found = curvature_along_update(step, self._learner.optimizers[0], named, limits.curvature)
        case = replace(case, model=model, course=course)
        if found is None:
            return case
        curvature, layers = found
        if not course.moves(limits.plateau) and course.high(limits.plateau):
            with isolated(self._untraced):
                hessian = Hessian(step, list(named.values()), limits.curvature.difference)
                curvature = self._add_eigenvalues(curvature, hessian)
        return replace(case, model=None if model is None else _with_updates(model, layers), curvature=curvature)

    def _compare_gradients(self, micros: Sequence[MicroBatch], course: Course, parameters: list[Tensor]) -> Course:
        """Measure the noise between batches, and whether one update reverses the gradient of its batch."""
        optimizer, limits = self._learner.optimizers[0], self._thresholds.examination
        elements = sum(parameter.numel() for parameter in parameters)
        most = max(limits.min_batches, limits.max_elements // max(1, elements))
        found = [gradient_of(self._step(micro, True), parameters) for micro in micros[-most:]]
        size, noise = _noise(found)
        course = replace(course, norm=size, noise=noise, batches=len(found), clear=_standard_errors(found))
        moved = update_direction(optimizer, found[-1], parameters)
        rate = float(optimizer.param_groups[0]["lr"])
        if moved is None:
            return course
        with values_kept(parameters):
            with torch.no_grad():
                for parameter, d in zip(parameters, moved, strict=True):
                    parameter.sub_(rate * d)
            after = gradient_of(self._step(micros[-1], True), parameters)
        sizes = norm(found[-1]) * norm(after)
        return replace(course, opposed=dot(found[-1], after) / sizes if sizes > 0 else None)

    def _add_eigenvalues(self, curvature: Curvature, hessian: Hessian) -> Curvature:
        try:
            smallest, largest = extreme_eigenvalues(hessian, self._thresholds.curvature)
        except ModuleNotFoundError as error:
            if not self._scipy_missed:
                self._scipy_missed = True
                _logger.warning("NaNGuard: saddle points and minima cannot be distinguished. %s", error)
            return curvature
        return replace(curvature, smallest=smallest, largest=largest)


def _noise(found: Sequence[Vector]) -> tuple[float, float | None]:
    """Norm of the mean gradient, and the noise of one batch's gradient relative to it."""
    count = len(found)
    mean = [torch.stack(parts).mean(0) for parts in zip(*found, strict=True)]
    size = norm(mean)
    if count < 2:
        return size, None
    apart = sum(norm([g - m for g, m in zip(one, mean, strict=True)]) ** 2 for one in found) / (count - 1)
    # The mean of a few gradients contains a share of the noise, which is subtracted.
    true = math.sqrt(max(size**2 - apart / count, 0.0))
    return size, math.sqrt(apart) / true if true > 0 else math.inf if apart > 0 else 0.0


def _standard_errors(found: Sequence[Vector]) -> float:
    """How many standard errors the mean gradient is from zero: the sum of gᵢᵀgⱼ over all pairs, divided by its noise.

    For gradients that are pure symmetric noise, it has mean 0 and variance 1.
    """
    flat = torch.stack([torch.cat([one.detach().reshape(-1).float() for one in vector]) for vector in found])
    pairs = (flat @ flat.T).double()[tuple(torch.triu_indices(len(flat), len(flat), 1))]
    spread = float(pairs.square().sum().sqrt())
    return float(pairs.sum()) / spread if spread > 0 else 0.0


def _with_updates(model: Model, layers: Sequence[Layer]) -> Model:
    known = {layer.path: layer.update for layer in layers}
    measured = {one.path for one in model.layers}
    # The trace sees no product with weights that are transformed first, for example scaled.
    others = tuple(layer for layer in layers if layer.path not in measured)
    return replace(model, layers=tuple(replace(one, update=known.get(one.path)) for one in model.layers) + others)


def _chance_level(objective: Objective | None) -> float | None:
    if objective is None or objective.chance is None:
        return None
    one_hot = objective.function == "mse_loss" and objective.classes is not None
    # An untrained model can still predict the mean of one-hot rows.
    return objective.chance * (1 - 1 / objective.classes) if one_hot and objective.classes else objective.chance

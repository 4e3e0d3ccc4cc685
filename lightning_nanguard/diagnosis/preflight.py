"""Checks the data and the untrained model before the first step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, TensorDataset

from lightning_nanguard.diagnosis.batch import batch_clues, tensor_fields
from lightning_nanguard.diagnosis.case import BadField, Case, Clues
from lightning_nanguard.diagnosis.isolation import Untraced, errors_logged
from lightning_nanguard.diagnosis.label_relation import label_relation
from lightning_nanguard.diagnosis.layers import measure_layers
from lightning_nanguard.diagnosis.replay import replay
from lightning_nanguard.diagnosis.rule_set import RuleSet
from lightning_nanguard.diagnosis.rules.phrases import outlier_finding
from lightning_nanguard.state.attributes import attributes_kept
from lightning_nanguard.thresholds.diagnosis import DEFAULT, DiagnosisThresholds, PreflightThresholds
from lightning_nanguard.types import Finding


@final
class Preflight:
    """Finds problems of the data and the untrained model, on one batch. It undoes everything that its runs change.

    Args:
        module: The module that will be trained.
        step: Runs a batch forward. ``step(batch)`` returns the loss with its graph, or ``None``.
        untraced: A context that undoes what a run changes: random streams, buffers, metrics, logged values, attributes.
        rules: The rules; ``None`` for the built-in ones.
        thresholds: When a number is evidence for a cause, and how much of the data is checked.
    """

    def __init__(
        self,
        module: nn.Module,
        step: Callable[[Any], Tensor | None],
        untraced: Untraced,
        *,
        rules: RuleSet | None = None,
        thresholds: DiagnosisThresholds = DEFAULT,
    ) -> None:
        self._module = module
        self._step = step
        self._untraced = untraced
        self._rules = RuleSet(thresholds=thresholds) if rules is None else rules
        self._thresholds = thresholds

    def findings(self, batch: Any, loader: Any = None, *, run: bool = True) -> tuple[Finding, ...]:
        """Findings, those with the highest confidence first. It never raises.

        Args:
            batch: The first batch.
            loader: The loader, to check more of the data if this changes nothing.
            run: Whether to run the batch forward and backward. ``False`` checks only the data.
        """
        model: Sequence[Finding] = ()
        data: Sequence[Finding] = ()
        case = Case()
        with errors_logged("the model could not be looked at before the first step"):
            case = self.case(batch, run=run)
            model = self._rules.findings(case)
        with errors_logged("the data could not be looked at before the first step"):
            data = self._data_findings(loader, case.clues)
        first: dict[str, Finding] = {}
        # Findings about the data set come first, because they name samples by their rows.
        for finding in (*data, *model):
            first.setdefault(finding.cause, finding)
        return tuple(sorted(first.values(), key=lambda finding: -finding.confidence))

    def case(self, batch: Any, *, run: bool = True) -> Case:
        """Collect the case of a batch and the model for the rules."""
        clues = batch_clues(batch, self._module, self._thresholds.data)
        if not run or any(isinstance(p, nn.UninitializedParameter) for p in self._module.parameters()):
            return Case(clues=clues)  # the run has to initialise lazy parameters itself
        step = partial(self._step, batch)
        model = measure_layers(self._module, batch, step, self._untraced, self._thresholds.layers)
        if model is None or model.objective is None or not model.objective.outside:
            clues = replay(clues, batch, self._module, step, untraced=self._untraced)
        return Case(clues=clues, model=model)

    def _data_findings(self, loader: Any, first: Clues) -> Sequence[Finding]:
        limits = self._thresholds
        with self._untraced(), torch.no_grad():
            sampled = sample_rows(loader, limits.preflight)
            if sampled is None:
                return ()
            batch, numbers = sampled
            clues = batch_clues(batch, nn.Identity(), limits.data)
            related = label_relation([batch], limits.labels)
        bad = _bad_rows(clues, numbers, first)
        found = list(self._rules.findings(Case(clues=Clues(bad_fields=bad, labels=related))))
        far = clues.inputs
        if far is not None and far.outliers and far.largest > limits.preflight.outlier_factor * far.usual:
            far = replace(far, outliers=tuple(numbers[i] for i in far.outliers))
            remedy = "Clean the data, or clip the inputs."
            found.append(outlier_finding("unnormalised_input", limits.confidence.outliers, far, remedy))
        return [
            replace(
                one,
                place=one.place.replace("of the batch", "of the data set"),
                suggestion=one.suggestion.replace("of this batch", "of the data set"),
            )
            for one in found
        ]


def _bad_rows(clues: Clues, numbers: Sequence[int], first: Clues) -> tuple[BadField, ...]:
    """The fields of the data set that hold NaN or Inf, with their rows."""
    # Some models use NaN for missing values.
    tolerated = first.loss is not None and math.isfinite(first.loss)
    harmless = {one.field for one in first.bad_fields} if tolerated else set()
    return tuple(
        replace(one, samples=tuple(numbers[i] for i in one.samples))
        for one in clues.bad_fields
        if one.field not in harmless
    )


def sample_rows(loader: Any, thresholds: PreflightThresholds = DEFAULT.preflight) -> tuple[Any, Sequence[int]] | None:
    """Rows of a data set as one batch, with their row numbers. The loader's iterator is not used.

    It reads all rows of a :class:`~torch.utils.data.TensorDataset`, and some rows spread over any other data set. It
    returns ``None`` if reading could change the run: for a stream, or with the user's own sampler. The caller has to
    restore random streams.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        return None
    if type(loader.sampler) not in (RandomSampler, SequentialSampler):
        return None
    data: Any = loader.dataset
    if type(data) is TensorDataset:
        fits = sum(tensor.nbytes for tensor in data.tensors) <= thresholds.max_bytes
        return (data.tensors, range(len(data))) if fits else None
    if not isinstance(data, (Dataset, list, tuple)) or not hasattr(data, "__len__") or loader.collate_fn is None:
        return None
    length = len(data)
    count = min(length, thresholds.max_samples)
    numbers = sorted({index * length // count for index in range(count)})
    many = getattr(data, "__getitems__", None)
    with attributes_kept(data):
        rows = many(numbers) if callable(many) else [data[number] for number in numbers]
        batch = loader.collate_fn(rows)
    # The user's collate function may not return one row for each sample.
    return (batch, numbers) if all(len(t) == count for _, t in tensor_fields(batch) if t.dim()) else None

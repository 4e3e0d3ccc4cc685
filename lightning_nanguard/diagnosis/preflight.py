"""A look at the data and the untrained model before the first step: advice, and no trace."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, TensorDataset

from lightning_nanguard.diagnosis.batch import fields_of, look_at, target_fields
from lightning_nanguard.diagnosis.clues import Case, Clues, Model
from lightning_nanguard.diagnosis.layers import examine
from lightning_nanguard.diagnosis.replay import eager, kept, replay
from lightning_nanguard.diagnosis.rules import findings
from lightning_nanguard.diagnosis.rules.words import outliers
from lightning_nanguard.state.attributes import attributes_kept
from lightning_nanguard.types import Finding

_logger = logging.getLogger("lightning_nanguard")


LOW = 0.5
"""Confidence up to which a finding is no more than a guess, and not told during a run."""


# Samples of a data set that are looked at, where they have to be fetched one by one; else the bytes.
_SAMPLES = 128


_BYTES = 2**30


# How many times the usual size a number has; heavy tails reach thousands.
_FAR = 1e6


def look_through(
    module: nn.Module,
    batch: Any,
    step: Callable[[], Tensor | None],
    untraced: Callable[[], AbstractContextManager[None]],
) -> Model | None:
    """What a batch looks like layer by layer, forward and backward; without a trace."""
    fields = dict(fields_of(batch))
    targets = [fields[name] for name in target_fields(batch, fields)]
    with untraced(), kept(module), eager():
        return examine(module, step, targets)


@final
class Preflight:
    """Looks at one batch and an untrained model.

    Args:
        module: What will be trained.
        step: Runs a batch forward: ``step(batch)`` gives the loss with its graph, ``None`` where there is none.
        untraced: What is run within is undone: random streams, buffers, metrics, logged values, attributes.
    """

    def __init__(
        self,
        module: nn.Module,
        step: Callable[[Any], Tensor | None],
        untraced: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._module = module
        self._step = step
        self._untraced = untraced

    def look(self, batch: Any, loader: Any = None, *, run: bool = True) -> tuple[Finding, ...]:
        """What is wrong, the surest first. It never raises.

        Args:
            batch: The first batch.
            loader: Where more of the data is looked at, if it can be read again without a trace.
            run: Whether the batch may be run forward and backward; ``False`` looks at the data alone.
        """
        model: Sequence[Finding] = ()
        data: Sequence[Finding] = ()
        case = Case()
        # Advice must never cost the run it is meant for.
        try:
            case = self.case(batch, run=run)
            model = findings(case)
        except Exception as error:
            _logger.debug("NaNGuard: the model could not be looked at before the first step: %r", error)
        try:
            data = self._look_at_data(loader, case.clues)
        except Exception as error:
            _logger.debug("NaNGuard: the data could not be looked at before the first step: %r", error)
        first: dict[str, Finding] = {}
        # The data set's comes first: it names every sample, with numbers that mean something to the user.
        for finding in (*data, *model):
            first.setdefault(finding.cause, finding)
        return tuple(sorted(first.values(), key=lambda finding: -finding.confidence))

    def case(self, batch: Any, *, run: bool = True) -> Case:
        """What a batch and the model show, for the rules."""
        clues = look_at(batch, self._module)
        if not run or any(isinstance(p, nn.UninitializedParameter) for p in self._module.parameters()):
            return Case(clues=clues)  # the first forward makes what is missing, which is for the run to do
        model = look_through(self._module, batch, partial(self._step, batch), self._untraced)
        if model is None or model.objective is None or not model.objective.outside:
            clues = replay(clues, batch, self._module, partial(self._step, batch), untraced=self._untraced)
        return Case(clues=clues, model=model)

    def _look_at_data(self, loader: Any, first: Clues) -> Sequence[Finding]:
        with self._untraced(), torch.no_grad():
            rows = rows_of(loader)
            if rows is None:
                return ()
            batch, numbers = rows
            seen = look_at(batch, nn.Identity())
        # Some models take NaN for what is missing.
        harmless = (
            {one.field for one in first.bad_fields} if first.loss is not None and math.isfinite(first.loss) else ()
        )
        told = tuple(
            replace(one, samples=tuple(numbers[i] for i in one.samples))
            for one in seen.bad_fields
            if one.field not in harmless
        )
        said = list(findings(Case(clues=Clues(bad_fields=told)))) if told else []
        far = seen.inputs
        if far is not None and far.outliers and max(abs(far.lowest), abs(far.highest)) > _FAR * far.usual:
            far = replace(far, outliers=tuple(numbers[i] for i in far.outliers))
            said.append(outliers("unnormalised_input", far, "Clean the data, or clip the inputs."))
        return [
            replace(
                one,
                place=one.place.replace("of the batch", "of the data set"),
                suggestion=one.suggestion.replace("of this batch", "of the data set"),
            )
            for one in said
        ]


def rows_of(loader: Any) -> tuple[Any, Sequence[int]] | None:
    """A batch of a data set that is read neither by the loader's iterator nor in its order, and its rows' numbers.

    All rows of a :class:`~torch.utils.data.TensorDataset`, else up to 128 spread over the data set. ``None`` where
    reading could leave a trace: data that comes as a stream, or in an order of the user's own. Random streams are for
    the caller to put back.

    Args:
        loader: What gives the batches.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        return None
    if type(loader.sampler) not in (RandomSampler, SequentialSampler):
        return None
    data: Any = loader.dataset
    if type(data) is TensorDataset:
        fits = sum(tensor.nbytes for tensor in data.tensors) <= _BYTES
        return (data.tensors, range(len(data))) if fits else None
    if not isinstance(data, (Dataset, list, tuple)) or not hasattr(data, "__len__") or loader.collate_fn is None:
        return None
    length = len(data)
    count = min(length, _SAMPLES)
    numbers = sorted({index * length // count for index in range(count)})
    many = getattr(data, "__getitems__", None)
    with attributes_kept(data):
        rows = many(numbers) if callable(many) else [data[number] for number in numbers]
        batch = loader.collate_fn(rows)
    # A collate function of the user's may give something else than one row for each sample.
    return (batch, numbers) if all(len(t) == count for _, t in fields_of(batch) if t.dim()) else None

"""Finds the bad samples of a faulty batch, and names them by row, or else by place and hash."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any, final

from torch.utils.data import default_collate

from lightning_nanguard.diagnosis.bad_samples import (
    FAR,
    NOT_FINITE,
    Bad,
    Found,
    SampleFault,
    SampleSearch,
    non_finite_samples,
    search,
)
from lightning_nanguard.diagnosis.batch import samples
from lightning_nanguard.diagnosis.isolation import errors_logged
from lightning_nanguard.diagnosis.module_state import other_signs
from lightning_nanguard.diagnosis.replay import loss_and_gradient_norm
from lightning_nanguard.diagnosis.rules.phrases import DRAWN, listed
from lightning_nanguard.diagnosis.rules.signs import in_gradient
from lightning_nanguard.diagnosis.state_comparison import state_of_snapshot
from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.measure.sample_parts import among, hash_of, is_separable, select_samples
from lightning_nanguard.record.bad_samples import BAD_SAMPLES_FILE, BadSample, hash_key
from lightning_nanguard.record.base import RunInfo
from lightning_nanguard.record.jsonl import JsonLines
from lightning_nanguard.state.attributes import attributes_kept
from lightning_nanguard.state.batch_history import BatchOrigin, MicroBatch, row_of
from lightning_nanguard.state.snapshot import Snapshot
from lightning_nanguard.thresholds.fixed import NUMBERS_PER_MESSAGE
from lightning_nanguard.trainer.batch_replay import TrainerBatchReplay
from lightning_nanguard.trainer.private.data_order import DataOrder, changes_batches
from lightning_nanguard.trainer.private.packages import LightningModule, Trainer
from lightning_nanguard.trainer.repeat.numeric_errors import may_be_numeric
from lightning_nanguard.types import Evidence, Fault, Finding, Row

_logger = logging.getLogger("lightning_nanguard")
_SPREAD = (
    "The rows of this batch are finite in the data set. Look at on_before_batch_transfer and on_after_batch_transfer, "
    "which change whole batches."
)


@final
class SampleFinder:
    """Finds the bad samples of faulty batches, counts and records them, and names them in findings.

    Args:
        trainer: The trainer.
        module: Its module.
        context: The objects that the parts of the guard share.
        replay: Runs batches again.
        order: Gives the rows of each batch.
        info: Facts about the fit.

    Attributes:
        offset: The difference between ``global_step`` after an update and the number of the update.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        context: GuardContext,
        replay: TrainerBatchReplay,
        order: DataOrder,
        info: RunInfo,
    ) -> None:
        self._trainer = trainer
        self._module = module
        self._context = context
        self._replay = replay
        self._order = order
        path, records = info.dirpath / BAD_SAMPLES_FILE, context.thresholds.records
        self._file = JsonLines(path, records, warns=False) if info.rank == 0 else None
        self._run_id = info.run_id
        self._known = context.samples
        self._limits = context.thresholds.samples
        self._search = SampleSearch(self._limits, context.thresholds.batches.healthy.extreme_factor)
        self._said = False
        # Passes over parts of batches so far, and those among them after which no sample was found.
        self._passes = self._in_vain = 0
        self.offset = 0
        # Batches that were already searched, because one batch may cause several faults.
        self._seen: dict[tuple[int, int], Found] = {}
        # Samples of the newest such batch that are finite in the data set but not in the batch.
        self._spread: dict[tuple[int, int], set[int]] = {}
        # The newest batch of one sample that is good among other samples.
        self._too_small: tuple[int, int] | None = None

    def close(self) -> None:
        """The fit is over."""
        if self._file is not None:
            self._file.close()

    # ---------------------------------------------------------------------------------------- after a fault

    def find(
        self,
        fault: Fault,
        evidence: Evidence,
        finding: Finding | None,
        micros: Sequence[MicroBatch],
        about: MicroBatch | None,
        good: Snapshot | None,
        *,
        run: bool,
    ) -> Finding | None:
        """Find the bad samples of a faulty update, and name those in the finding; all ranks must call it.

        Args:
            fault: The fault that was found.
            evidence: The facts about it.
            finding: Its cause.
            micros: The micro-batches that may hold bad samples.
            about: The micro-batch of the finding.
            good: The last good state.
            run: Whether parts of the batches may be run again.
        """
        mine: list[BadSample] = []
        by_chance = finding is not None and DRAWN in finding.evidence
        if fault.scope == "batch" and (evidence.corrupt is None or evidence.undo) and not by_chance:
            with errors_logged("the samples of a bad batch could not be told"):
                for micro in micros:
                    mine += self._of(micro, evidence, finding, about, good, run=run)
        self._take(mine)
        if finding is None or about is None:
            return finding
        with errors_logged("the samples of a bad batch could not be named"):
            if run and not (finding.samples or mine or by_chance):
                finding = self._of_gradient(fault, evidence, finding, about)
            return self._named(finding, about, mine)
        return finding

    def found(self, origin: BatchOrigin) -> Found:
        """The bad samples of a batch that was searched; empty for any other batch."""
        return self._seen.get((origin.epoch, origin.position), {})

    def _at(self, good: Snapshot | None) -> AbstractContextManager[None] | None:
        # LBFGS uses its state while it runs closures, so it must not be replaced.
        usable = good is not None and not self._context.learner.quasi_newton
        return state_of_snapshot(self._context.learner, good) if usable and good is not None else None

    def _of(
        self,
        micro: MicroBatch,
        evidence: Evidence,
        finding: Finding | None,
        about: MicroBatch | None,
        good: Snapshot | None,
        *,
        run: bool,
    ) -> list[BadSample]:
        origin = micro.origin
        if origin is None or (origin.epoch, origin.position) in self._seen:
            return []
        self._seen[origin.epoch, origin.position] = {}
        if len(self._seen) > self._limits.batches_waiting:
            del self._seen[next(iter(self._seen))]
        run = run and self._in_vain <= self._limits.most_runs_ahead + self._context.state.step
        passes = self._passes
        usable = evidence.corrupt is None and not evidence.undo
        inside = (nullcontext() if usable else self._at(good)) if run else None
        with self._parts(micro, inside) as bad:
            healthy = self._replay.batches.healthy_before()
            found = self._search.judged(micro.batch, healthy, bad, _cause(finding)) if _has_rows(micro) else {}
        if bad is None and finding is not None and micro is about and self._blames_samples(finding):
            found = {index: SampleFault(finding.cause) for index in finding.samples} | found
        elif bad is not None and usable:
            found = self._bad_under(partial(self._at, good), micro, found)
        found = self._without_spread(micro, origin, found)
        self._seen[origin.epoch, origin.position] = found  # the present update leaves these out
        for draw in range(self._limits.other_weights):
            found = self._bad_under(partial(other_signs, self._module, draw), micro, found)
        if bad is not None and not found and samples(micro.batch) == 1:
            self._too_small = origin.epoch, origin.position
        if not found:
            self._in_vain += self._passes - passes
        return self._samples(micro, origin, found)

    def _blames_samples(self, finding: Finding) -> bool:
        told = self._context.thresholds.diagnosis.confidence.told
        return finding.scope == "batch" and finding.confidence > told

    def _bad_under(
        self, other: Callable[[], AbstractContextManager[None] | None], micro: MicroBatch, found: Found
    ) -> Found:
        """Remove the samples that are good under other weights, because the weights are at fault for them."""
        doubtful = [index for index, fault in found.items() if fault.cause not in (NOT_FINITE, FAR)]
        if not doubtful:
            return found  # avoids a copy of the learner
        with self._parts(micro, other()) as bad:
            innocent = {index for index in doubtful if bad is not None and bad([index]) is False}
        return {index: fault for index, fault in found.items() if index not in innocent}

    def _without_spread(self, micro: MicroBatch, origin: BatchOrigin, found: Found) -> Found:
        """Remove the samples that are finite in the data set: a transfer hook has spread NaN over the batch."""
        keys = origin.keys if origin.collated else None  # else the collate function may have
        if keys is None or len(keys) != samples(micro.batch) or not changes_batches(self._trainer, self._module):
            return found
        bad = {index for index, fault in found.items() if fault.cause == NOT_FINITE}
        spread = {index for index in bad if self._holds_non_finite(keys[index]) is False}
        if spread:
            self._spread = {(origin.epoch, origin.position): spread}
        return {index: fault for index, fault in found.items() if index not in spread}

    @contextmanager
    def _parts(self, micro: MicroBatch, inside: AbstractContextManager[None] | None) -> Iterator[Bad | None]:
        """Inside, parts of a batch can be run. Yields ``None`` if they cannot.

        Args:
            micro: The batch.
            inside: Context with the state from which they are run; ``None`` if they cannot be run.
        """
        origin, count = micro.origin, samples(micro.batch) or 0
        if inside is None or origin is None or not origin.collated or not is_separable(micro.batch, count):
            yield None
            return
        with inside:
            yield partial(self._is_bad, micro)

    def _is_bad(self, micro: MicroBatch, indices: Sequence[int]) -> bool | None:
        part = self._part(micro, indices)
        try:
            found = self._measured(micro, part)
        except Exception as error:
            return True if may_be_numeric(error, part) else None
        return None if found is None else not all(one - one == 0.0 for one in found)

    def _measured(self, micro: MicroBatch, part: Any) -> tuple[float, float] | None:
        """Loss and gradient norm of a part of a batch."""
        self._passes += 1
        with self._replay.untraced():
            step = partial(self._replay.rerun, replace(micro, batch=part), False)
            return loss_and_gradient_norm(self._module, step)

    def _of_gradient(self, fault: Fault, evidence: Evidence, finding: Finding, micro: MicroBatch) -> Finding:
        """Name the samples without which a gradient that is finite and far too large is a usual one.

        That says nothing about whether they are bad, so they are not listed as bad samples.
        """
        norm, usual, count = fault.value, evidence.usual_norm, samples(micro.batch) or 0
        finite = in_gradient(fault) and fault.scope == "batch" and norm is not None and math.isfinite(norm)
        known = finite and evidence.corrupt is None and not evidence.undo and bool(usual) and count > 1
        if not known or self._in_vain > self._limits.most_runs_ahead + self._context.state.step:
            return finding
        limit, passes = math.sqrt((usual or 0.0) * (norm or 0.0)), self._passes

        def makes_it(indices: Sequence[int]) -> bool | None:
            found = self._measured(micro, self._part(micro, indices))
            return None if found is None else found[1] > limit

        with self._parts(micro, nullcontext()) as bad:
            share = self._limits.largest_share
            found = None if bad is None else search(range(count), makes_it, share, self._limits)
            rest = [index for index in range(count) if index not in (found or ())]
            left = self._measured(micro, select_samples(micro.batch, rest)) if found else None
        if not found or left is None:
            self._in_vain += self._passes - passes
            return finding
        words = f"without {listed('sample', found)} of this batch the gradient norm would be {left[1]:.4g}"
        numbers = {**finding.evidence, "norm_without": left[1]}
        return replace(finding, samples=found, evidence=numbers, suggestion=f"{words}; {finding.suggestion}")

    def _part(self, micro: MicroBatch, indices: Sequence[int]) -> Any:
        """Some samples of a batch. A batch of one sample may be bad because of its size alone."""
        if samples(micro.batch) == 1:
            for healthy in reversed(self._replay.batches.healthy_before()):
                if (part := among(micro.batch, healthy)) is not None:
                    return part
        # Batch norm rejects a batch of one.
        return select_samples(micro.batch, indices if len(indices) > 1 else [*indices, *indices])

    def _samples(self, micro: MicroBatch, origin: BatchOrigin, found: Found) -> list[BadSample]:
        return [
            BadSample(
                cause=fault.cause,
                row=self._row(origin, index, not_finite=fault.cause in (NOT_FINITE, "non_finite_input")),
                hash=_hash(micro, index),
                columns=fault.columns,
                epoch=origin.epoch,
                batch=micro.index,
                position=None if origin.position == micro.index else origin.position,
                index=index,
                rank=self._context.ranks.rank,
                global_step=micro.update + self.offset,
                run=self._run_id,
            )
            for index, fault in found.items()
        ]

    def _row(self, origin: BatchOrigin, index: int, *, not_finite: bool) -> Row | None:
        keys = origin.keys
        if keys is None or index >= len(keys):
            return None
        # The user's collate function may have changed the order of the samples.
        if not origin.collated and not (not_finite and self._holds_non_finite(keys[index])):
            return None
        return row_of(keys[index])

    def _holds_non_finite(self, key: Any) -> bool | None:
        """Whether a row of the data set holds NaN or Inf; ``None`` if it cannot be read."""
        data = self._order.dataset()
        with suppress(Exception), self._replay.untraced(), attributes_kept(data):
            return bool(non_finite_samples(default_collate([data[key]])))
        return None

    # ---------------------------------------------------------------------------------------- what is known

    def _take(self, mine: Sequence[BadSample]) -> None:
        """Count and record the bad samples of all ranks."""
        ranks = self._context.ranks
        found = list(mine)
        if self._context.many:
            everywhere = ranks.gather([one.to_dict() for one in mine])
            found = [BadSample.from_dict(one) for of_rank in everywhere for one in of_rank]
        if found and self._known.quarantine and not self._said and self._file is not None:
            self._said = True
            what = (
                "bad samples cannot be left out (quarantine=True), because each batch combines samples of several "
                "loaders"
                if self._order.combines()
                else "bad samples are left out from now on (quarantine=True)"
            )
            _logger.warning("NaNGuard: %s; nanguard samples %s lists them.", what, self._file.path.parent)
        for one in found:
            times = self._known.met(one.key)
            if self._file is not None:
                with suppress(Exception):
                    self._file.write(replace(one, times=times))

    def _named(self, finding: Finding, about: MicroBatch, mine: Sequence[BadSample]) -> Finding:
        origin = about.origin
        if origin is None:
            return finding
        if self._too_small == (origin.epoch, origin.position):
            return replace(finding, samples=())
        here = {one.index: one for one in mine if (one.epoch, one.batch) == (origin.epoch, about.index)}
        indices = finding.samples or (tuple(here) if finding.scope == "batch" else ())
        spread = self._spread.get((origin.epoch, origin.position), set())
        if spread and spread == set(indices):
            finding = replace(finding, suggestion=_SPREAD)
        indices = tuple(index for index in indices if index not in spread)
        if not indices:
            return replace(finding, samples=()) if spread else finding
        evidence = dict(finding.evidence)
        if self._context.many:
            evidence["rank"] = float(self._context.ranks.rank)
        rows = [here[index].row if index in here else self._row(origin, index, not_finite=True) for index in indices]
        known = [row for row in rows if row is not None]
        hashes = [made for index in indices[:NUMBERS_PER_MESSAGE] if (made := _hash(about, index))]
        if len(known) < len(rows):
            known = []
            evidence |= {"position": float(about.index), "hash": ", ".join(hashes)}
        keys: list[Row] = [*known] or [hash_key(one) for one in hashes]
        times = max(map(self._known.times, keys), default=0)
        if times > 1:
            evidence["times_met"] = float(times)
        return replace(finding, samples=tuple(indices), rows=tuple(known), evidence=evidence)


def _cause(finding: Finding | None) -> str:
    return finding.cause if finding is not None and finding.scope == "batch" else "loss or gradient not finite"


def _has_rows(micro: MicroBatch) -> bool:
    """Whether the first axis of the tensors of a batch counts its samples, as far as it is known."""
    return micro.drawn is None or micro.drawn == samples(micro.batch)


def _hash(micro: MicroBatch, index: int) -> str:
    """The hash of a sample; empty if the batch cannot be taken apart, so that it would not be found again."""
    if _has_rows(micro):
        with suppress(Exception):
            return hash_of(micro.batch, index)
    return ""

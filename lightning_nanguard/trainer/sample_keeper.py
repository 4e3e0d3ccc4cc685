"""Finds the part of a bad batch from which an update can be made."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, final

from torch import nn

from lightning_nanguard.diagnosis.batch import samples
from lightning_nanguard.guard.guard import Guard
from lightning_nanguard.measure.sample_parts import is_separable, select_samples
from lightning_nanguard.state.batch_history import BatchOrigin, MicroBatch
from lightning_nanguard.trainer.batch_replay import TrainerBatchReplay
from lightning_nanguard.trainer.private.packages import LightningModule
from lightning_nanguard.trainer.repeat.accumulation_window import WindowEntry
from lightning_nanguard.trainer.repeat.numeric_errors import may_be_numeric
from lightning_nanguard.trainer.repeat.outcome import Outcome
from lightning_nanguard.trainer.sample_finder import SampleFinder
from lightning_nanguard.types import Fault, Finding

_logger = logging.getLogger("lightning_nanguard")


@final
class GoodPart(NamedTuple):
    """The good samples of a batch.

    Attributes:
        batch: The batch that the loader would have given for them.
        origin: Its origin in the data.
        whole: The whole batch.
        why: Fault and cause of the whole batch.
    """

    batch: Any
    origin: BatchOrigin
    whole: Any
    why: tuple[Fault, Finding | None]


@final
class SampleKeeper:
    """Gives the good samples of a bad batch, if the loss is the mean over its samples.

    Args:
        module: The trained module.
        replay: Runs batches again.
        finder: Finds the bad samples.
        guard: Finds causes, and checks the state.
        always: Whether to keep the good samples of every bad batch. Otherwise they are kept once most updates were
            skipped.
    """

    def __init__(
        self,
        module: LightningModule,
        replay: TrainerBatchReplay,
        finder: SampleFinder,
        guard: Guard,
        *,
        always: bool,
    ) -> None:
        self._module = module
        self._replay = replay
        self._finder = finder
        self._check = guard.steps.check
        self._records = guard.steps.records
        self._limits = guard.context.thresholds.samples
        # Whether the loss of a batch is the mean of its parts' losses; ``None`` before the test.
        self._is_mean: bool | None = None
        self._said = False
        self.always = always
        self._active = always

    def active(self) -> bool:
        """Whether to keep the good samples of a bad batch now."""
        if not self._active and self._check.share_skipped(self._limits.least_updates) > self._limits.most_skipped:
            self._active = True
            _logger.warning(
                "NaNGuard: most updates had to be skipped. From now on such an update is made from the good samples of "
                "its batch, if there are any. SkipStep(keep_good_samples=False) turns this off."
            )
        return self._active

    def good_part(self, micro: WindowEntry, fault: Fault) -> GoodPart | None:
        """Replace a micro-batch by its good samples; ``None`` if it must not be split.

        Args:
            micro: The micro-batch. Everything must be restored to its start.
            fault: Its fault.
        """
        if micro.kept is not None or not self._check.state_is_finite():
            return None
        batch = micro.run.batch
        with self._replay.suspecting(micro.run.batch_idx):
            finding = self._records.diagnosis(fault)
        known = next((one for one in reversed(self._replay.batches.newest()) if one.batch is batch), None)
        if known is None or known.origin is None:
            return None
        count = samples(batch) or 0
        if not known.origin.collated or not is_separable(batch, count):
            self.say("torch's default_collate did not put the batches together")
            return None
        bad = self._finder.found(known.origin)
        good = [index for index in range(count) if index not in bad]
        if not bad or not good:
            return None
        keys = None if known.origin.keys is None else tuple(known.origin.keys[index] for index in good)
        part = GoodPart(select_samples(batch, good), replace(known.origin, keys=keys), batch, (fault, finding))
        if self._is_mean is None:
            self._is_mean = self._try(replace(known, batch=part.batch), len(good))
        if self._is_mean is False:
            self.say("the loss of a batch is not the mean of the losses of its parts")
        if not self._is_mean:
            return None
        micro.run.take(part.batch)
        micro.start.use(part.batch)
        return part

    def settle(self, micro: WindowEntry, outcome: Outcome, part: GoodPart) -> bool:
        """After a run of the good samples: return whether to keep the result; if not, bring back the whole batch."""
        if outcome.fault is not None or outcome.error is not None:
            micro.run.take(part.whole)
            return False
        micro.kept = part.why
        self._replay.batches.exchange(part.whole, part.batch, part.origin)
        return True

    def say(self, reason: str) -> None:
        """Log once why bad batches are skipped as a whole."""
        if not self._said:
            self._said = True
            _logger.warning(
                "NaNGuard: no update can be made from the good samples of a bad batch, so the whole batch is "
                "skipped: %s.",
                reason,
            )

    def _try(self, micro: MicroBatch, count: int) -> bool | None:
        """Whether the loss of a batch is the weighted mean of the losses of two parts of it."""
        if count <= 1:
            return None
        cut = max(1, count // 3)  # unequal parts, to distinguish a weighted mean from a plain one
        try:
            whole, one, other = (self._loss(micro, *part) for part in ((0, count), (0, cut), (cut, count)))
        except Exception as error:
            if not may_be_numeric(error, micro.batch):
                _logger.debug("NaNGuard: a part of a batch could not be run: %r", error)
                return False
            return None
        mean = (cut * one + (count - cut) * other) / count
        if not math.isfinite(mean) or not math.isfinite(whole):
            return None
        return abs(whole - mean) <= self._limits.separable_error * max(abs(whole), abs(one), abs(other))

    def _loss(self, micro: MicroBatch, start: int, end: int) -> float:
        part = replace(micro, batch=select_samples(micro.batch, range(start, end)))
        # In evaluation mode, because dropout and batch norm would make the losses differ although the loss is a mean.
        with self._replay.untraced(), _evaluating(self._module):
            loss = self._replay.rerun(part, True)
            return math.nan if loss is None else float(loss.detach())


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    # The mode of the module itself does not change, because its training_step may depend on it.
    modes = [(one, one.training) for one in module.modules() if one is not module]
    for one, _ in modes:
        one.training = False
    try:
        yield
    finally:
        for one, training in modes:
            one.training = training

"""Stores the newest batches, and where they came from: to be run again, and to try learning rates on."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from lightning_nanguard.measure.batches import largest_magnitudes, mapped, nested_tensors
from lightning_nanguard.measure.tensors import size
from lightning_nanguard.state.attribute_memory import Attributes
from lightning_nanguard.state.batch_contents import BatchContents
from lightning_nanguard.state.random_state import RandomState, RandomStreams
from lightning_nanguard.thresholds.batches import BatchesThresholds
from lightning_nanguard.types import Row

_UNCHANGED = nullcontext()


@final
@dataclass(frozen=True, slots=True)
class BatchOrigin:
    """Where a batch came from.

    Attributes:
        position: Number of batches that the loader gave before it in this epoch. After a resume within an epoch it
            differs from Lightning's ``batch_idx``, because the loader begins again.
        epoch: The epoch.
        keys: The keys that the sampler drew for it, one for each sample. ``None`` without a sampler over a map-style
            data set, and if the batches do not come in the order of the sampler.
        collated: Whether torch's ``default_collate`` made it, so that sample ``i`` belongs to key ``i``.
        nothing_left: Whether every sample of it is known to be bad, so that none is left to train on.
    """

    position: int
    epoch: int = 0
    keys: tuple[Any, ...] | None = None
    collated: bool = False
    nothing_left: bool = False


@final
@dataclass(slots=True, eq=False)
class MicroBatch:
    """One micro-batch. Only :class:`BatchHistory` changes it, when its step begins.

    Attributes:
        update: Number of the update it belongs to.
        index: Its index in the epoch.
        batch: The batch itself.
        random: Random states of torch before it: on the CPU, and on the device if that has one.
        streams: Positions of all random streams before it; ``None`` if they are not known.
        origin: Where the batch came from; ``None`` if that is not known.
        clock: ``global_step`` before its update, and its epoch; ``None`` if they are not known.
        contents: What its dictionaries and lists held when its step began; ``None`` before.
    """

    update: int
    index: int
    batch: Any
    random: tuple[Tensor, ...] = ()
    streams: RandomState | None = None
    origin: BatchOrigin | None = None
    clock: tuple[int, int] | None = None
    contents: BatchContents | None = None

    @property
    def drawn(self) -> int | None:
        """Number of samples that the sampler drew for it; ``None`` if that is not known."""
        return None if self.origin is None or self.origin.keys is None else len(self.origin.keys)


@final
class BatchHistory:
    """Keeps references to the newest batches, to run them again or to compare other batches with them.

    The micro-batches of the last updates are stored with the random state before each, so that they can be run again
    unchanged. The newest few healthy batches are kept longer, without their random state.

    Args:
        device: The device of the run, whose random state is stored too.
        updates: Number of updates whose micro-batches are stored; 1 stores those of the present one.
        updates_small: The same for small batches; ``updates`` is used if it is larger.
        thresholds: How many batches are kept, and when one is strange.

    Example:
        >>> history = BatchHistory(torch.device("cpu"))
        >>> history.add(update=1, index=0, batch=torch.zeros(2, 3))
        >>> random = history.begin_step()
        >>> history.end_step()
        >>> history.accept_update(1)
        >>> [index for _, index in history.healthy]
        [0]
    """

    def __init__(
        self,
        device: torch.device,
        updates: int = 1,
        updates_small: int = 0,
        thresholds: BatchesThresholds = BatchesThresholds(),
    ) -> None:
        self._streams = RandomStreams(device, thresholds.repeated)
        self._limits = thresholds.micro_batches
        self._healthy_limits = thresholds.healthy
        self._measured_every = thresholds.repeated.measured_every
        self._updates = updates
        self._updates_small = max(updates_small, updates)
        self._micros: deque[MicroBatch] = deque()
        # Bytes of each micro-batch except the newest.
        self._sizes: deque[int] = deque()
        self._most = self._healthy_limits.most
        # Each batch, its index, and the batch as its step began, which is another object if the step changed it.
        self._healthy: deque[tuple[Any, int, Any]] = deque(maxlen=self._most)
        self._depth = thresholds.repeated.depth
        # The batches that :meth:`as_begun` has restored.
        self._restored: list[Any] = []
        self._accepted = 0
        # The newest micro-batch, and the module's attributes before its step.
        self._begun: tuple[Any, Attributes | None] = None, None
        self._exchanged: tuple[Any, Any] = None, None
        self._left_out: Any = None

    def add(
        self,
        update: int,
        index: int,
        batch: Any,
        origin: BatchOrigin | None = None,
        clock: tuple[int, int] | None = None,
    ) -> None:
        """Store a micro-batch that is about to be run. The arguments are those of :class:`MicroBatch`."""
        micros, updates, limits = self._micros, self._updates, self._limits
        if self._updates_small > updates and (_samples(batch) or limits.small + 1) <= limits.small:
            updates = self._updates_small
        while micros and (micros[0].update <= update - updates or len(micros) >= updates * limits.per_update):
            self._let_go()
        if micros:
            if len(self._sizes) < len(micros):  # a single micro-batch is not measured
                self._sizes.append(_bytes(micros[-1].batch))
            while micros and sum(self._sizes) > limits.most_bytes:
                self._let_go()
        micros.append(MicroBatch(update, index, batch, origin=origin, clock=clock))

    def _let_go(self) -> None:
        self._micros.popleft()
        if self._sizes:
            self._sizes.popleft()

    def bytes_kept(self) -> int:
        """Bytes of the tensors that the stored batches keep in memory, each counted once."""
        batches = [one.batch for one in self._micros] + [batch for *_, batch in self._healthy]
        tensors = {id(tensor): tensor for batch in batches for tensor in nested_tensors(batch)}
        return sum(map(size, tensors.values()))

    def withdraw(self) -> None:
        """Remove the newest micro-batch, because it is not run."""
        if self._micros:
            self._micros.pop()
            while len(self._sizes) > len(self._micros):
                self._sizes.pop()

    def begin_step(self) -> RandomState:
        """Store the random streams before the step of the newest micro-batch, and return their positions."""
        state = self._streams.open()
        if self._micros and self._micros[-1].streams is None:
            # If one step evaluates several times (LBFGS), the first evaluation counts.
            self._micros[-1].streams, self._micros[-1].random = state, state.torch
            self.note_contents()
        return state

    def note_contents(self) -> None:
        """The step of the newest micro-batch begins: note what its dictionaries and lists hold."""
        self._micros[-1].contents = BatchContents(self._micros[-1].batch, self._depth)

    def as_begun(self) -> AbstractContextManager[None]:
        """Inside, the micro-batches hold what they held when their steps began, whatever these removed from them.

        At the end they hold again what their steps left, for the hooks of others.
        """
        changed = [(one.batch, one.contents) for one in self._micros if one.contents and one.contents.changed()]
        return self._begun_again(changed) if changed else _UNCHANGED

    @contextmanager
    def _begun_again(self, changed: list[tuple[Any, BatchContents]]) -> Iterator[None]:
        left = [contents.now() for _, contents in changed]
        for batch, contents in changed:
            contents.restore()
            self._restored.append(batch)
        try:
            yield
        finally:
            for (_, contents), after in zip(changed, left, strict=True):
                self._restored.pop()
                if not contents.changed():  # else the step was made again
                    after.restore()

    def begin_from(self, attributes: Attributes) -> None:
        """Store the module's attributes before the step of the newest micro-batch, such as a hidden state."""
        if self._micros:
            self._begun = self._micros[-1].batch, attributes

    def end_step(self) -> None:
        """Note the end of that step."""
        self._streams.close()

    def exchange(self, batch: Any, part: Any, origin: BatchOrigin) -> None:
        """Replace a micro-batch by a part of it, because only this part was trained on.

        Args:
            batch: The whole micro-batch.
            part: The part.
            origin: Where the part came from.
        """
        self._exchanged = batch, part
        for place, one in enumerate(self._micros):
            if one.batch is batch:
                contents = BatchContents(part, self._depth)
                self._micros[place] = replace(one, batch=part, origin=origin, contents=contents)

    def accept(self, batch: Any, index: int) -> None:
        """Store a batch that turned out healthy, once."""
        if batch is self._left_out and batch is not None:
            self._left_out = None
            return
        healthy, limits = self._healthy, self._healthy_limits
        whole, part = self._exchanged
        if batch is whole:
            batch, self._exchanged = part, (None, None)
        if healthy and healthy[-1][0] is batch:
            return
        if self._accepted % self._measured_every == 0:
            room = limits.most_bytes // max(1, _bytes(batch))
            self._healthy = healthy = deque(healthy, maxlen=min(self._most, room))
        self._accepted += 1
        whole = mapped(batch, _same_memory) if any(one is batch for one in self._restored) else batch
        healthy.append((batch, index, whole))

    def leave_out(self, batch: Any) -> None:
        """Note that a micro-batch was left out of its update, so that it does not count as healthy."""
        known = len(self._healthy)
        self._healthy = deque((one for one in self._healthy if one[0] is not batch), maxlen=self._healthy.maxlen)
        self._left_out = batch if len(self._healthy) == known else None

    def accept_update(self, update: int) -> None:
        """Store the newest micro-batch of a healthy update, if it is still here."""
        for one in reversed(self._micros):
            if one.update <= update and not (one.origin is not None and one.origin.nothing_left):
                self.accept(one.batch, one.index)
                return

    @property
    def healthy(self) -> list[tuple[Any, int]]:
        """The newest healthy batches and their indices in the epoch, the newest last."""
        return [(whole, index) for _, index, whole in self._healthy]

    def to_try_on(self, batch: Any, batch_idx: int) -> list[tuple[Any, int]]:
        """The newest healthy batches and their indices; if there is only one, the present batch, too.

        Args:
            batch: The present batch.
            batch_idx: Its index in the epoch.
        """
        healthy = self.healthy
        return healthy if len(healthy) > 1 else [*healthy, (batch, batch_idx)]

    def sizes_vary(self, count: int) -> bool:
        """Whether the newest healthy batches differ in their number of samples, or fewer than ``count`` are stored."""
        newest = self.healthy[-count:]
        return len(newest) < count or len({_samples(batch) for batch, _ in newest}) > 1

    def earlier(self) -> Any:
        """The newest healthy batch or, before one is known, the newest batch of an earlier update; ``None`` without."""
        if self._healthy:
            return self._healthy[-1][2]
        return next((one.batch for one in reversed(self._micros) if one.update < self._micros[-1].update), None)

    def healthy_before(self) -> list[Any]:
        """The newest healthy batches before the present update, the newest last."""
        # Micro-batches of an unfinished window are already among the healthy ones.
        own = {id(micro.batch) for micro in self.newest()}
        return [whole for batch, _, whole in self._healthy if id(batch) not in own]

    def strange(self, batch: Any, *, extreme: bool = False) -> bool | None:
        """Whether a tensor of ``batch`` has much larger values than in any of the stored healthy batches.

        ``None`` if too few healthy batches have the same structure to compare with. Reads from the device.

        Args:
            batch: The batch.
            extreme: Whether to ask for far larger values, by the limit for ``extreme`` faults.
        """
        limits, mine = self._healthy_limits, largest_magnitudes(batch)
        others = [one for *_, kept in self._healthy if len(one := largest_magnitudes(kept)) == len(mine)]
        if len(others) < limits.least_compared or not mine:
            return None
        factor = limits.extreme_factor if extreme else limits.strange_factor
        return any(
            not one <= factor * max(before) for one, *before in zip(mine, *others, strict=True) if max(before) > 0
        )

    def of(self, update: int) -> list[MicroBatch]:
        """The micro-batches of an update, the newest last. A batch with several updates belongs to each of them."""
        known = max((one.update for one in self._micros if one.update <= update), default=None)
        return [one for one in self._micros if one.update == known]

    def nothing_left(self) -> bool:
        """Whether every sample of the newest micro-batch is known to be bad."""
        origin = self._micros[-1].origin if self._micros else None
        return origin is not None and origin.nothing_left

    def since(self, update: int) -> list[MicroBatch]:
        """The micro-batches of all updates after ``update``."""
        return [one for one in self._micros if one.update > update]

    def newest(self) -> list[MicroBatch]:
        """The micro-batches of the last update."""
        return self.of(self._micros[-1].update) if self._micros else []

    def clear(self) -> None:
        """Drop the micro-batches of a finished update, if those of no earlier update are needed."""
        if self._updates == 1:
            self._micros.clear()
            self._sizes.clear()
            self._begun = None, None

    def rewind(self, micro: MicroBatch) -> None:
        """Restore the random streams as they were before a micro-batch, and for the newest one the attributes."""
        if micro.streams is not None:
            micro.streams.restore()
        batch, attributes = self._begun
        if attributes is not None and micro.batch is batch:
            attributes.restore()


def _same_memory(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _bytes(batch: Any) -> int:
    return sum(map(size, nested_tensors(batch)))


def _samples(batch: Any) -> int | None:
    dense = (tensor for tensor in nested_tensors(batch) if tensor.layout == torch.strided)
    return next((len(tensor) for tensor in dense if tensor.dim()), None)


def row_of(key: Any) -> Row:
    """The row for a sampler's key: the key itself if it is an integer, else the key in words.

    Example:
        >>> row_of(7), row_of("cat/3.png")
        (7, 'cat/3.png')
    """
    try:
        return operator.index(key)
    except TypeError:
        return str(key)


def without(keys: Iterable[Any], rows: set[Row]) -> list[Any]:
    """The keys of a batch whose rows are not among ``rows``, in their order.

    Example:
        >>> without([3, 1, 4], {1})
        [3, 4]
    """
    return [key for key in keys if row_of(key) not in rows]

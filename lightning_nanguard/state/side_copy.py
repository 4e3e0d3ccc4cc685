"""Copies from a device to the host in the background, and detects if the sources changed during the copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import final

import torch
from torch import Tensor

from lightning_nanguard.measure.checksum import weighted_sum, word_weights
from lightning_nanguard.state.device import Device, Event
from lightning_nanguard.thresholds.snapshots import PlacementThresholds

_WORD = torch.int64.itemsize


@final
class CopyCheck:
    """Says whether a :class:`SideCopy` has copied the values that the sources had when it was started.

    Args:
        events: Events after the copies.
        verdicts: For each device a number in pinned memory: 1 if the copy is right.
    """

    def __init__(self, events: Sequence[Event] = (), verdicts: Sequence[Tensor] = ()) -> None:
        self.events = list(events)
        self._verdicts = list(verdicts)

    def arrived(self) -> bool:
        """Whether :meth:`intact` would not wait for a device."""
        return all(event.query() for event in self.events)

    def intact(self) -> bool:
        """Whether nothing wrote to the sources before they were copied. Waits for the copies."""
        for event in self.events:
            event.synchronize()
        return all(bool(verdict) for verdict in self._verdicts)


@final
@dataclass(slots=True)
class _Pack:
    """Tensors that pass through the staging memory together: the bytes of the sources and their targets."""

    sources: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)
    nbytes: int = 0


@final
class SideCopy:
    """Copies from a device to pinned memory on its own stream, while the run continues.

    Forward and backward do not wait for the copy. The next update does, on the device. Any write to a source before
    that is detected. For this the bytes pass through staging memory on the device. Their checksum there is compared
    with that of the sources at the beginning.

    Args:
        device: The device.
        thresholds: Size of the staging memory.
    """

    def __init__(self, device: Device, thresholds: PlacementThresholds = PlacementThresholds()) -> None:
        self._device = device
        self._limits = thresholds
        self._staging: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._under_way: list[tuple[torch.device, Event]] = []
        # The sources, and tensors of the run's stream that the side stream reads. While they are referenced, the
        # allocator does not reuse their memory.
        self._in_use: list[Tensor] = []
        self._waits: list[tuple[Event, Event]] = []

    @staticmethod
    def can_take(source: Tensor) -> bool:
        """Whether a tensor can be copied in the background: it must be dense, so that its copy has the same strides."""
        dense: bool = torch.ops.aten.is_non_overlapping_and_dense.default(source)
        return dense and source.numel() > 0

    def send(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> CopyCheck:
        """Start to copy. Each target is in host memory and is like its source, which is on a device."""
        self.settle()
        self._waits, self._in_use = [], list(sources)
        pairs: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
        for target, source in zip(targets, sources, strict=True):
            where = self._device.where(source)
            assert where is not None
            pairs.setdefault(where, []).append((_flat_bytes(target), _flat_bytes(source)))
        sent = [self._send(where, _packs(among, self._limits.staging_bytes)) for where, among in pairs.items()]
        return CopyCheck([event for event, _ in sent], [verdict for _, verdict in sent])

    def _send(self, where: torch.device, packs: Sequence[_Pack]) -> tuple[Event, Tensor]:
        driver = self._device.driver
        own, side = driver.own_stream(where), driver.side_stream(where)
        staging, weights = self._staging_on(where, packs)
        before: list[Tensor] = []
        after: list[Tensor] = []
        verdict = staging.new_zeros((), dtype=torch.int64)
        answer = self._device.pinned_like(verdict)
        for pack in packs:
            driver.launch(own, partial(_stage, pack, staging, weights, before))
        driver.wait(side, driver.record(own))
        for pack in packs:
            driver.launch(side, partial(_stage, pack, staging, weights, after))
            driver.to_host(side, pack.targets, _slices(pack, staging))
        driver.launch(side, partial(_compare, before, after, verdict))
        driver.to_host(side, [answer], [verdict])
        self._in_use += [*before, verdict]
        event = driver.record(side)
        self._under_way.append((where, event))
        return event, answer

    def _staging_on(self, where: torch.device, packs: Sequence[_Pack]) -> tuple[Tensor, Tensor]:
        needed = -(-max(pack.nbytes for pack in packs) // _WORD) * _WORD
        known = self._staging.get(where)
        if known is None or len(known[0]) < needed:
            staging = packs[0].sources[0].new_empty(needed)
            known = self._staging[where] = staging, word_weights(staging)
        return known

    def settle(self) -> None:
        """Let the next work of the run wait for copies under way. The host does not wait."""
        driver = self._device.driver
        for where, event in self._under_way:
            own = driver.own_stream(where)
            before = driver.record(own, timed=True)
            driver.wait(own, event)
            self._waits.append((before, driver.record(own, timed=True)))
        self._under_way, self._in_use = [], []

    def waited(self) -> float | None:
        """Seconds that the run waited for the last copy; ``None`` if that is not known yet."""
        if self._under_way or not all(after.query() for _, after in self._waits):
            return None
        return max([before.elapsed_time(after) / 1e3 for before, after in self._waits], default=0.0)


def _flat_bytes(tensor: Tensor) -> Tensor:
    # Take the elements in the order of memory, whatever the strides are.
    flat = tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    return (torch.view_as_real(flat).view(-1) if flat.is_complex() else flat).view(torch.uint8)


def _packs(pairs: Sequence[tuple[Tensor, Tensor]], most: int) -> list[_Pack]:
    packs: list[_Pack] = []
    for target, source in _pieces(pairs, most):
        if not packs or packs[-1].nbytes + len(source) > most:
            packs.append(_Pack())
        packs[-1].targets.append(target)
        packs[-1].sources.append(source)
        packs[-1].nbytes += len(source)
    return packs


def _pieces(pairs: Sequence[tuple[Tensor, Tensor]], most: int) -> Iterator[tuple[Tensor, Tensor]]:
    for target, source in pairs:
        yield from zip(torch.split(target, most), torch.split(source, most), strict=True)


def _slices(pack: _Pack, staging: Tensor) -> list[Tensor]:
    return list(torch.split(staging[: pack.nbytes], [len(one) for one in pack.sources]))


def _stage(pack: _Pack, staging: Tensor, weights: Tensor, sums: list[Tensor]) -> None:
    words = staging[: -(-pack.nbytes // _WORD) * _WORD]
    words[pack.nbytes :].zero_()
    torch.cat(pack.sources, out=words[: pack.nbytes])
    sums.append(weighted_sum(words.view(torch.int64), weights))


def _compare(before: list[Tensor], after: list[Tensor], verdict: Tensor) -> None:
    verdict.copy_((torch.stack(before) == torch.stack(after)).all())

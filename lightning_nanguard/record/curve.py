"""Stores the curves of a run in a small file: loss, gradient norm and learning rate of every update."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, final

from lightning_nanguard.errors import require
from lightning_nanguard.record.files import append, read_whole
from lightning_nanguard.thresholds.records import RECORDS, RecordsThresholds
from lightning_nanguard.types import Reading

_logger = logging.getLogger("lightning_nanguard")

CURVE_FILE = "curve.csv"
"""Name of the file in a run's folder."""


class CurvePoint(NamedTuple):
    """The measurements of one update, or of several in a row.

    Attributes:
        step: ``global_step`` after the update, or after the last of several.
        updates: Number of updates.
        optimizer: Index of the optimizer.
        loss: Mean of the finite losses; NaN or Inf if none is finite; ``None`` if there is no loss.
        loss_max: The largest loss; NaN if one is NaN.
        grad_norm: Mean of the finite gradient norms.
        grad_norm_max: The largest gradient norm; NaN if one is NaN.
        lr: Effective learning rate of the first group in the last update.
        clip_val: The clipping value that the guard had turned on at that time.
    """

    step: int
    updates: int
    optimizer: int
    loss: float | None
    loss_max: float | None
    grad_norm: float | None
    grad_norm_max: float | None
    lr: float | None
    clip_val: float | None


@final
class CurveFile:
    """Writes the curves of a run to a file of bounded size, rarely.

    Readings wait in memory for a few seconds at most. If the file has too many rows, neighbouring rows are joined, and
    each new row then stands for twice as many updates. A joined row keeps the largest values, so that no spike is lost.

    Args:
        path: The file. Existing rows are kept.
        thresholds: How many rows it has, and how often it is written to.
        clock: Returns the time in seconds.

    Attributes:
        offset: The difference between ``global_step`` and the step of a reading.
        listener: Called with each reading and its learning rate; ``None`` for none.
    """

    def __init__(
        self, path: Path, thresholds: RecordsThresholds = RECORDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        require(thresholds.curve_rows >= 2, thresholds, "curve_rows", thresholds.curve_rows, "at least 2")
        self._path = path
        self._thresholds = thresholds
        self._clock = clock
        self._due = clock() + thresholds.seconds_between_curve_writes
        self._waiting: list[tuple[Reading, float | None, float | None]] = []
        self._unjoined: list[CurvePoint] = []
        # Number of updates in one row, and number of rows in the file; not known before the first write.
        self._stride = 0
        self._rows = 0
        self._warned = False
        self.offset = 0
        self.listener: Callable[[Reading, float | None], None] | None = None

    def add(self, reading: Reading, lr: float | None, clip_val: float | None) -> None:
        """Add the reading of an update; called in every update."""
        self._waiting.append((reading, lr, clip_val))
        if self.listener is not None:
            self.listener(reading, lr)
        if self._clock() >= self._due or len(self._waiting) >= self._thresholds.readings_waiting_for_curve:
            self.write()

    def write(self, *, last: bool = False) -> None:
        """Write the waiting readings. If this fails, they are lost, and a message is logged once.

        Args:
            last: Whether this is the last write, so that the last row may stand for fewer updates.
        """
        self._due = self._clock() + self._thresholds.seconds_between_curve_writes
        try:
            if self._stride == 0:
                self._look_at_the_file()
            points, self._unjoined = _joined([*self._unjoined, *self._take()], self._stride, keep_rest=not last)
            self._append(points)
            while self._rows > self._thresholds.curve_rows:
                self._thin_out()
        except OSError as error:
            self._take()
            if not self._warned:
                self._warned = True
                _logger.warning("NaNGuard: cannot write the curves of the run to %s: %s.", self._path, error)

    def _take(self) -> list[CurvePoint]:
        waiting, self._waiting = self._waiting, []
        points = []
        for reading, lr, clip_val in waiting:
            loss, norm = reading.loss, reading.grad_norm
            step = reading.step + self.offset
            points.append(CurvePoint(step, 1, reading.optimizer_index, loss, loss, norm, norm, lr, clip_val))
        return points

    def _look_at_the_file(self) -> None:
        points = read_curve(self._path) if self._path.exists() else []
        self._stride = max((point.updates for point in points), default=1)
        self._rows = len(points)

    def _append(self, points: Sequence[CurvePoint]) -> None:
        if not points:
            return
        with open(self._path, "a+b", buffering=0) as file:
            header = "" if file.tell() else _line(CurvePoint._fields)
            append(file, (header + "".join(map(_row, points))).encode())
        self._rows += len(points)

    def _thin_out(self) -> None:
        self._stride *= 2
        points, _ = _joined(read_curve(self._path), self._stride, keep_rest=False)
        text = _line(CurvePoint._fields) + "".join(map(_row, points))
        new = self._path.with_name(f"{self._path.name}.new")
        new.write_text(text, encoding="utf-8")
        os.replace(new, self._path)
        self._rows = len(points)


def read_curve(path: Path) -> list[CurvePoint]:
    """Read the rows of a file that :class:`CurveFile` wrote, in order. Torn rows are left out.

    A resumed run begins again at an earlier step: its rows come later.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    points = []
    for line in read_whole(path).decode("utf-8", "replace").splitlines():
        try:
            step, updates, optimizer, *numbers = line.split(",")
            loss, loss_max, norm, norm_max, lr, clip_val = [float(cell) if cell else None for cell in numbers]
            if updates == "1":
                loss_max, norm_max = loss, norm
            point = CurvePoint(int(step), int(updates), int(optimizer), loss, loss_max, norm, norm_max, lr, clip_val)
        except ValueError:
            continue
        points.append(point)
    return points


def thinned(points: Sequence[CurvePoint], rows: int) -> list[CurvePoint]:
    """Join neighbouring points until at most ``rows`` are left; the largest values are kept.

    Args:
        points: Points of one optimizer.
        rows: Largest number of points. For a resumed run there may be a few more.

    Example:
        >>> points = [CurvePoint(step, 1, 0, 1.0, float(step), None, None, None, None) for step in range(100)]
        >>> [point.loss_max for point in thinned(points, 4)]
        [31.0, 63.0, 95.0, 99.0]
    """
    stride = max((point.updates for point in points), default=1)
    while sum(point.updates for point in points) > stride * rows:
        stride *= 2
    return _joined(points, stride, keep_rest=False)[0]


def trained_again(points: Sequence[CurvePoint]) -> list[bool]:
    """For each point, whether a resumed run has trained its step again, so that the point is not part of the final run.

    Args:
        points: Points of one optimizer, in the order they were written.

    Example:
        >>> points = [CurvePoint(step, 1, 0, 1.0, 1.0, None, None, None, None) for step in (1, 2, 3, 2, 3, 4)]
        >>> trained_again(points)
        [False, True, True, False, False, False]
    """
    again = [False] * len(points)
    later, first = math.inf, math.inf  # first step of later fits, and of this fit
    for index in range(len(points) - 1, -1, -1):
        step = points[index].step
        if step >= first:
            later = min(later, first)
        again[index], first = step >= later, step
    return again


def final_points(points: Sequence[CurvePoint]) -> list[CurvePoint]:
    """The points of the final run: all except those whose steps a resumed run has trained again.

    Example:
        >>> points = [CurvePoint(step, 1, 0, 1.0, 1.0, None, None, None, None) for step in (1, 2, 3, 2, 3, 4)]
        >>> [point.step for point in final_points(points)]
        [1, 2, 3, 4]
    """
    return [point for point, again in zip(points, trained_again(points), strict=True) if not again]


def _joined(points: Sequence[CurvePoint], stride: int, *, keep_rest: bool) -> tuple[list[CurvePoint], list[CurvePoint]]:
    """Points that stand for up to ``stride`` updates each, and the points that wait to be joined."""
    if stride == 1:
        return list(points), []
    done: list[CurvePoint] = []
    # For each optimizer: points that will be joined, and the number of their updates.
    buckets: dict[int, tuple[list[CurvePoint], int]] = {}
    for point in points:
        bucket, updates = buckets.get(point.optimizer, ([], 0))
        # If a resumed run begins at an earlier step, its points are not joined with those before it.
        if bucket and (updates + point.updates > stride or point.step <= bucket[-1].step):
            done.append(_join(bucket))
            bucket, updates = [], 0
        bucket.append(point)
        buckets[point.optimizer] = bucket, updates + point.updates
    left = [bucket for bucket, _ in buckets.values() if bucket]
    if not keep_rest:
        return done + [_join(bucket) for bucket in left], []
    return done, [point for bucket in left for point in bucket]


def _join(points: Sequence[CurvePoint]) -> CurvePoint:
    last = points[-1]
    _, updates, _, losses, largest_losses, norms, largest_norms, _, _ = zip(*points, strict=True)
    return last._replace(
        updates=sum(updates),
        loss=_mean(losses, updates),
        loss_max=_largest(largest_losses),
        grad_norm=_mean(norms, updates),
        grad_norm_max=_largest(largest_norms),
    )


def _mean(values: Sequence[float | None], weights: Sequence[int]) -> float | None:
    finite = [
        (value, w) for value, w in zip(values, weights, strict=True) if value is not None and math.isfinite(value)
    ]
    if not finite:
        return next((value for value in values if value is not None), None)
    total = sum(weight for _, weight in finite)
    # Divided first, because the sum of large numbers could overflow.
    return sum(value * (weight / total) for value, weight in finite)


def _largest(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.nan if any(map(math.isnan, known)) else max(known, default=None)


def _row(point: CurvePoint) -> str:
    step, updates, optimizer, loss, loss_max, norm, norm_max, lr, clip_val = point
    if updates == 1:
        loss_max = norm_max = None  # equal to the mean, so left out
    numbers = (loss, loss_max, norm, norm_max, lr, clip_val)
    return _line([step, updates, optimizer, *("" if number is None else f"{number:.7g}" for number in numbers)])


def _line(cells: Iterable[object]) -> str:
    return ",".join(map(str, cells)) + "\n"

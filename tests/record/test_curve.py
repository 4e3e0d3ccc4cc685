"""The curves of a run are kept in a small file."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_nanguard.record.curve import CURVE_FILE, CurveFile, CurvePoint, read_curve
from lightning_nanguard.thresholds.records import RecordsThresholds
from lightning_nanguard.types import Reading
from tests.record.data import lines

FEW = RecordsThresholds(curve_rows=8, readings_waiting_for_curve=4)


def reading(step: int, loss: float | None = 1.0, norm: float | None = 2.0, optimizer: int = 0) -> Reading:
    return Reading(step, optimizer, loss, norm)


def written(path: Path, readings: Iterable[Reading], thresholds: RecordsThresholds = FEW) -> list[CurvePoint]:
    file = CurveFile(path, thresholds)
    for one in readings:
        file.add(one, 0.1, None)
    file.write(last=True)
    return read_curve(path) if path.exists() else []


def test_every_update_is_there(tmp_path: Path) -> None:
    """What was measured is read back, NaN, Inf and what is missing included, at the step of the trainer."""
    file = CurveFile(tmp_path / CURVE_FILE)
    file.offset = 100
    file.add(reading(1, 0.5, 2.5), 0.1, None)
    file.add(reading(2, math.nan, math.inf, optimizer=1), None, 1.5)
    file.add(reading(3, None, None), 1e-30, None)
    assert not (tmp_path / CURVE_FILE).exists()
    file.write(last=True)
    one, two, three = read_curve(tmp_path / CURVE_FILE)
    assert one == CurvePoint(101, 1, 0, 0.5, 0.5, 2.5, 2.5, 0.1, None)
    assert repr(two) == repr(CurvePoint(102, 1, 1, math.nan, math.nan, math.inf, math.inf, None, 1.5))
    assert three == CurvePoint(103, 1, 0, None, None, None, None, 1e-30, None)


def test_the_file_stays_small_and_loses_no_spike(tmp_path: Path) -> None:
    """Past its limit neighbouring rows are joined; every update is counted, the largest values stay."""
    path = tmp_path / CURVE_FILE
    points = written(path, [reading(step, 1e9 if step == 333 else 1.0) for step in range(1, 1001)])
    assert len(points) <= 8
    assert sum(point.updates for point in points) == 1000
    assert [point.step for point in points] == sorted(point.step for point in points)
    assert points[-1].step == 1000
    assert max(point.loss_max or 0.0 for point in points) == 1e9
    assert {point.loss for point in points if point.loss_max == 1.0} == {1.0}


values = st.none() | st.floats(width=32, allow_nan=True, allow_infinity=True)


@given(readings=st.lists(st.tuples(values, values, st.integers(0, 1)), max_size=60))
def test_joining_keeps_what_is_extreme(tmp_path_factory: pytest.TempPathFactory, readings: list[tuple]) -> None:  # type: ignore[type-arg]
    """Whatever is measured, each optimizer's updates are counted, and its worst loss and norm are in the file."""
    path = tmp_path_factory.mktemp("curve") / CURVE_FILE
    points = written(path, [reading(step, *one) for step, one in enumerate(readings, start=1)])
    assert len(points) <= 8
    for optimizer in (0, 1):
        own = [point for point in points if point.optimizer == optimizer]
        assert sum(point.updates for point in own) == sum(one[2] == optimizer for one in readings)
        for place, kept in ((0, [p.loss_max for p in own]), (1, [p.grad_norm_max for p in own])):
            seen = [one[place] for one in readings if one[2] == optimizer and one[place] is not None]
            known = [value for value in kept if value is not None]
            if any(map(math.isnan, seen)):
                assert any(map(math.isnan, known))
            elif seen:
                assert max(known) == pytest.approx(max(seen), rel=1e-6)


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    """A resumed run adds to the file, at the resolution it has; a torn row is left out; rows are never joined across
    the place where it went on."""
    path = tmp_path / CURVE_FILE
    before = written(path, [reading(step) for step in range(1, 41)])
    stride = max(point.updates for point in before)
    assert stride > 1
    with open(path, "a") as file:
        file.write("41,1,0,0.")
    after = written(path, [reading(step, 3.0) for step in range(31, 39)])
    resumed = [point for point in after if point.loss == 3.0]
    assert sum(point.updates for point in resumed) == 8
    assert all(point.loss in (1.0, 3.0) for point in after)


def test_little_is_lost_in_a_kill(tmp_path: Path) -> None:
    """Readings are written after ten seconds at the latest, and together."""
    now = [0.0]
    file = CurveFile(tmp_path / CURVE_FILE, clock=lambda: now[0])
    for step in range(25):
        now[0] += 1.0
        file.add(reading(step), 0.1, None)
        there = len(read_curve(tmp_path / CURVE_FILE)) if (tmp_path / CURVE_FILE).exists() else 0
        assert there == (step + 1) // 10 * 10


def test_nothing_can_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder that cannot be written costs the curves and one warning, nothing more."""
    (tmp_path / "file").write_text("")
    file = CurveFile(tmp_path / "file" / CURVE_FILE, FEW)
    for step in range(100):
        file.add(reading(step), 0.1, None)
    file.write(last=True)
    assert [line for line in lines(caplog) if "cannot write the curves" in line] == lines(caplog)
    assert len(lines(caplog)) == 1


def test_a_file_of_something_else(tmp_path: Path) -> None:
    """Lines that are no rows are left out, and reading a missing file says so."""
    (tmp_path / CURVE_FILE).write_bytes(b"\xff\xfe\nstep,loss\n1,2\n7,1,0,0.5,,1,,0.1,\n,,,,,,,,\n")
    assert [point.step for point in read_curve(tmp_path / CURVE_FILE)] == [7]
    with pytest.raises(FileNotFoundError, match="none"):
        read_curve(tmp_path / "none")
    with pytest.raises(ValueError, match="curve_rows=1"):
        CurveFile(tmp_path / CURVE_FILE, RecordsThresholds(curve_rows=1))

"""The console shows every kind of intervention, and not every intervention."""

from __future__ import annotations

import logging

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_nanguard.record.console import Console
from lightning_nanguard.record.messages import describe
from lightning_nanguard.thresholds.records import RecordsThresholds
from tests.record.data import ROLLBACK, SKIP, lines, step


def shown(caplog: pytest.LogCaptureFixture) -> list[int]:
    return [int(line.split()[2]) for line in lines(caplog)]


def test_speaks_through_the_logger(caplog: pytest.LogCaptureFixture) -> None:
    """One warning of the logger lightning_nanguard, no Python warning."""
    Console().write(SKIP)
    assert caplog.record_tuples == [("lightning_nanguard", logging.WARNING, f"NaNGuard: {describe(SKIP)}")]


def test_thins_out_by_doubling(caplog: pytest.LogCaptureFixture) -> None:
    """Ten are shown, then the 20th, 40th, 80th …, each with the number left out."""
    console = Console()
    for number in range(1, 101):
        console.write(step(number))
    assert shown(caplog) == [*range(1, 11), 20, 40, 80]
    assert "ever more rarely" in lines(caplog)[9]
    assert [line.rpartition("(and ")[2].split()[0] for line in lines(caplog)[10:]] == ["9", "19", "39"]
    caplog.clear()
    console.close()
    assert lines(caplog) == ["NaNGuard: 87 of 100 interventions were not shown here."]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    show_first=st.integers(1, 12),
    kinds=st.lists(st.sampled_from(["a", "b", "stop"]), max_size=120),
)
def test_nothing_is_lost_in_total(caplog: pytest.LogCaptureFixture, show_first: int, kinds: list[str]) -> None:
    """Lines shown and numbers left out add up to all interventions, and stops are always shown."""
    caplog.clear()
    console = Console(RecordsThresholds(shown_per_kind=show_first))
    for number, kind in enumerate(kinds):
        console.write(step(number, fault=kind, remedies=("stop",) if kind == "stop" else ("skip",)))
    shown = len(caplog.records)
    assert sum("; stopped the run" in line for line in lines(caplog)) == kinds.count("stop")
    console.close()
    hidden = int(lines(caplog)[-1].split()[1]) if len(caplog.records) > shown else 0
    assert shown + hidden == len(kinds)
    assert shown <= kinds.count("stop") + 2 * (show_first + 8)


def test_rare_kind_is_shown_among_many_of_another(caplog: pytest.LogCaptureFixture) -> None:
    """A thousand skipped batches do not hide the rollback that follows."""
    console = Console(RecordsThresholds(shown_per_kind=5))
    for number in range(1000):
        console.write(step(number))
    caplog.clear()
    console.write(ROLLBACK)
    assert shown(caplog) == [430]


def test_stop_is_always_shown(caplog: pytest.LogCaptureFixture) -> None:
    """The intervention that ends the run is never left out, and the thinning goes on around it."""
    console = Console(RecordsThresholds(shown_per_kind=1))
    for number in range(1, 8):
        console.write(step(number, remedies=("stop",)))
    assert shown(caplog) == list(range(1, 8))
    caplog.clear()
    console.close()
    assert not caplog.records


def test_close_starts_anew(caplog: pytest.LogCaptureFixture) -> None:
    """A second fit is shown like a first one; closing twice says nothing twice."""
    console = Console(RecordsThresholds(shown_per_kind=1))
    for _ in range(3):
        console.write(SKIP)
    console.close()
    caplog.clear()
    console.close()
    assert not caplog.records
    console.write(SKIP)
    assert len(caplog.records) == 1


def test_rejects_showing_nothing() -> None:
    """A wrong argument is named with its value."""
    with pytest.raises(ValueError, match="shown_per_kind=0"):
        Console(RecordsThresholds(shown_per_kind=0))

"""The console shows every kind of intervention in full once, and not every intervention."""

from __future__ import annotations

import logging

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_nanguard.record.console import Console
from lightning_nanguard.record.messages import tell, tell_again
from lightning_nanguard.thresholds.records import RecordsThresholds
from tests.record.data import ROLLBACK, SKIP, lines, step


def shown(caplog: pytest.LogCaptureFixture) -> list[int]:
    return [int(line.split()[2]) for line in lines(caplog)]


def test_speaks_through_the_logger(caplog: pytest.LogCaptureFixture) -> None:
    """One warning of the logger lightning_nanguard, no Python warning."""
    Console().write(SKIP)
    assert caplog.record_tuples == [("lightning_nanguard", logging.WARNING, f"NaNGuard: {tell(SKIP)}")]


def test_thins_out_by_doubling(caplog: pytest.LogCaptureFixture) -> None:
    """The first is told in full, then the 2nd, 4th, 8th … in one line with the count; closing adds nothing."""
    console = Console()
    for number in range(1, 101):
        console.write(step(number))
    console.close()
    assert shown(caplog) == [1, 2, 4, 8, 16, 32, 64]
    first, *later = lines(caplog)
    assert first == f"NaNGuard: {tell(step(1))}"
    assert later == [f"NaNGuard: {tell_again(step(n))} ({n} so far)" for n in (2, 4, 8, 16, 32, 64)]
    assert all(len(line.splitlines()) == 1 for line in later)


def test_another_cause_is_another_kind(caplog: pytest.LogCaptureFixture) -> None:
    """The same fault with the same remedy is told in full again where its cause is another."""
    console = Console()
    for cause in ("non_finite_input", "non_finite_input", "log_of_zero"):
        console.write(step(1, cause=cause))
    assert [len(line.splitlines()) > 1 for line in lines(caplog)] == [True, False, True]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    show_first=st.integers(1, 12),
    kinds=st.lists(st.sampled_from(["a", "b", "stop"]), max_size=120),
)
def test_little_is_shown_of_much(caplog: pytest.LogCaptureFixture, show_first: int, kinds: list[str]) -> None:
    """Every kind is shown, stops always, and of the others no more than the logarithm of their number."""
    caplog.clear()
    console = Console(RecordsThresholds(shown_per_kind=show_first))
    for number, kind in enumerate(kinds):
        console.write(step(number, fault=kind, remedies=("stop",) if kind == "stop" else ("skip",)))
    assert sum("done: stopped the run" in line for line in lines(caplog)) == kinds.count("stop")
    for kind in "ab":
        of_kind = [line for line in lines(caplog) if f"): {kind} " in line]
        assert bool(of_kind) == (kind in kinds)
        assert len(of_kind) <= show_first + 8


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


def test_an_observed_run_would_stop_once(caplog: pytest.LogCaptureFixture) -> None:
    """With observe=True the run goes on after a stop, whatever its fault: the first one is shown, other faults as ever;
    the next fit begins anew."""
    console = Console()
    for _ in range(2):
        for number in range(1, 8):
            console.write(step(number, remedies=("stop", "skip"), applied=False))
            console.write(step(10 + number, fault=f"kind_{number // 4}", remedies=("stop",), applied=False))
            console.write(step(20 + number, applied=False))
        stop, goes_on, *others = lines(caplog)
        assert "done: would have stopped the run" in stop
        assert goes_on == "NaNGuard: with observe=True the run goes on; further stops are not shown."
        assert [int(line.split()[2]) for line in others] == [21, 22, 24]
        console.close()
        caplog.clear()


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

"""What a sink has to bring and gets for nothing. Functions are sinks, and what is neither is refused by name."""

from __future__ import annotations

import math
from typing import Any

import pytest

import lightning_nanguard
from lightning_nanguard import NaNGuard
from lightning_nanguard.record.base import CallableSink, Sink, as_sinks
from lightning_nanguard.types import Intervention
from tests.record.data import SKIP


def test_write_is_all_it_needs() -> None:
    """A class with write alone is a sink of rank 0 that is called at once; one without write cannot be made."""

    class Beep(lightning_nanguard.Sink):
        def write(self, intervention: Intervention) -> None:
            pass

    sink = Beep()
    sink.open(lightning_nanguard.RunInfo())
    sink.write(SKIP)
    sink.close()
    assert (sink.every_rank, sink.timeout) == (False, None)

    class Mute(lightning_nanguard.Sink):
        pass

    with pytest.raises(TypeError, match=r"Mute.*write"):
        Mute()  # type: ignore[abstract]


class Beep(Sink):
    """The smallest sink."""

    def write(self, intervention: Intervention) -> None:
        pass


class Timed(Beep):
    """A sink whose timeout is an argument."""

    def __init__(self, timeout: Any) -> None:
        self.timeout = timeout


def test_calls_the_function() -> None:
    """The function gets the record itself, on rank 0 unless every rank is asked for."""
    got: list[Intervention] = []
    CallableSink(got.append).write(SKIP)
    assert got == [SKIP]
    assert [CallableSink(print).every_rank, CallableSink(print, every_rank=True).every_rank] == [False, True]


def test_functions_are_wrapped() -> None:
    """Sinks stay as they are, in their place; None and an empty list are none."""
    beep = Beep()
    first, second = as_sinks([beep, print])
    assert first is beep
    assert isinstance(second, CallableSink)
    assert second.function is print
    assert as_sinks(None) == as_sinks([]) == ()
    (timed,) = as_sinks([Timed(0.5)])
    assert timed.timeout == 0.5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("mail", r"NaNGuard\(sinks='mail'\): expected a list of Sink instances or functions"),
        (Beep(), r"NaNGuard\(sinks=<.*Beep.*>\): expected a list"),
        (print, r"NaNGuard\(sinks=<.*print.*>\): expected a list"),
        ([Beep], r"NaNGuard\(sinks=…\): .*Beep'> is not an instance of Sink; write Beep\(\)"),
        ([dict], r"write dict\(\)"),
        ([print, 3], r"NaNGuard\(sinks=…\): 3 is neither an instance of Sink nor a function"),
        ([lambda: None], r"lambda.* cannot be called with one argument, the Intervention"),
        ([lambda one, two: None], r"lambda.* cannot be called with one argument"),
    ],
)
def test_wrong_sinks_fail_at_once(given: Any, message: str) -> None:
    """What is no sink is refused when the guard is made, not when the first record comes."""
    with pytest.raises(TypeError, match=message):
        NaNGuard(sinks=given)


@pytest.mark.parametrize("timeout", [0, -1.0, math.nan, math.inf, True, "1"])
def test_wrong_timeout(timeout: Any) -> None:
    """A timeout that is no number of seconds is named with its sink."""
    with pytest.raises(ValueError, match=rf"Timed has timeout={timeout!r}: expected a number of seconds above 0"):
        NaNGuard(sinks=[Timed(timeout)])

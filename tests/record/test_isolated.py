"""What a sink raises is logged once and goes no further."""

from __future__ import annotations

from functools import partial

import pytest

from lightning_nanguard.record.base import Sink
from lightning_nanguard.record.callable_sink import CallableSink
from lightning_nanguard.record.isolated import IsolatedSink
from lightning_nanguard.types import Intervention
from tests.record.data import SKIP, Broken, lines


class Interrupted(Sink):
    """The user pressed Ctrl-C while it wrote."""

    def write(self, intervention: Intervention) -> None:
        raise KeyboardInterrupt

    def close(self) -> None:
        raise SystemExit(3)


class Called:
    """An object that can be called."""

    def __call__(self, intervention: Intervention) -> None:
        pass


def test_missed_records_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    """The first failure is logged with its name, the number of missed records at the end."""
    sink = IsolatedSink(Broken())
    for _ in range(3):
        sink.write(SKIP)
    assert "tests.record.data.Broken could not take a record: RuntimeError: no connection" in lines(caplog)[0]
    assert len(caplog.records) == 1
    caplog.clear()
    sink.close()
    assert "Broken missed 3 records" in lines(caplog)[0]
    assert "could not be closed: ConnectionError: still none" in lines(caplog)[1]


def test_interrupt_goes_through() -> None:
    """Ctrl-C and an exit are no fault of a sink in the thread that trains; in another one they are."""
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        IsolatedSink(Interrupted()).write(SKIP)
    with pytest.raises(SystemExit, match="3"):
        IsolatedSink(Interrupted()).close()
    IsolatedSink(Interrupted(), catches=BaseException).close()


@pytest.mark.parametrize(
    ("sink", "name"),
    [
        (Broken(), "tests.record.data.Broken"),
        (CallableSink(lines), "tests.record.data.lines"),
        (CallableSink([].append), "builtins.list.append"),
        (CallableSink(print), "builtins.print"),
        (CallableSink(Called()), "tests.record.test_isolated.Called"),
        (CallableSink(partial(print, "!")), "functools.partial"),
    ],
)
def test_name(sink: Sink, name: str) -> None:
    """Messages call a sink by its class, or by the function it calls."""
    assert IsolatedSink(sink).name == name

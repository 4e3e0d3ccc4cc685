"""What every way to read must do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from lightning_nanguard.guard.context import Settings
from lightning_nanguard.guard.rank_readback import Readback
from lightning_nanguard.guard.readback import Arrived
from lightning_nanguard.state.batch_undo import BatchUndo
from tests.guard.memory_ranks import memory_ranks
from tests.guard.plain_loop import PlainLoop

KINDS: dict[str, Callable[[], PlainLoop]] = {
    "step": lambda: PlainLoop(settings=Settings()),
    "deferred": lambda: PlainLoop(settings=Settings(deferred=True)),
    "deferred, read in time": lambda: in_time(PlainLoop(settings=Settings(deferred=True))),
    "ranks": lambda: among_ranks(Settings()),
    "deferred ranks": lambda: among_ranks(Settings(deferred=True)),
}


def among_ranks(settings: Settings) -> PlainLoop:
    """One of two ranks, of which each hears only itself."""
    (ranks,) = memory_ranks(1)
    ranks.world = 2
    return PlainLoop(settings=settings, ranks=ranks)


def in_time(loop: PlainLoop) -> PlainLoop:
    """Every update is read before it is made."""
    loop.guard._parts.caution.load_state_dict({"undone": 1, "careful_until": 1000})
    return loop


def steps(loop: PlainLoop, count: int, seen: Callable[[int, str, Iterable[Arrived]], Any]) -> Readback:
    """Make some updates as the guard does; ``seen`` is given what arrives, with its occasion."""
    readback, meter, state = loop.guard._parts.readback, loop.guard._parts.meter, loop.guard.context.state
    for number in range(1, count + 1):
        loss = loop.loss() + number
        loop.optimizer.zero_grad()
        meter.see_loss(loss)
        loss.backward()
        seen(number, "due", readback.due(0))
        state.step += 1
        at_once = readback.submit(0, BatchUndo(loop.net))
        seen(number, "submit", [] if at_once is None else [at_once])
        seen(number, "arrived", readback.arrived())
        loop.optimizer.step()
        meter.end_batch()
        readback.end_batch()
    return readback


@pytest.fixture(params=["soon", "late"])
def arrives(request: pytest.FixtureRequest) -> None:
    """Readings are on the host at once, or as late as they may be."""
    if request.param == "late":
        request.getfixturevalue("late")


@pytest.mark.usefixtures("arrives")
@pytest.mark.parametrize("kind", KINDS)
def test_every_reading_arrives_once_and_in_order(kind: str) -> None:
    """By the end of a flush each update was read, the oldest first, at most two updates late."""
    loop, read, delays = KINDS[kind](), list[int](), list[int]()

    def note(number: int, occasion: str, arrived: Iterable[Arrived]) -> None:
        for one in arrived:
            read.append(one.reading.step)
            delays.append(number - one.reading.step)
            assert one.reading.loss is not None
            assert int(one.reading.loss) >= one.reading.step

    readback = steps(loop, 7, note)
    note(7, "flush", readback.flush())
    assert read == [1, 2, 3, 4, 5, 6, 7]
    assert max(delays) <= 2
    assert list(readback.flush()) == []


@pytest.mark.usefixtures("arrives")
@pytest.mark.parametrize("kind", KINDS)
def test_what_arrives_late_says_so(kind: str) -> None:
    """A reading is late unless it is given when its own update is submitted; only then is it at hand."""
    loop = KINDS[kind]()
    readback = loop.guard._parts.readback

    def note(number: int, occasion: str, arrived: Iterable[Arrived]) -> None:
        for one in arrived:
            assert one.late is (occasion != "submit")
            if not one.late:
                assert readback.at_hand == one.reading

    note(5, "flush", steps(loop, 5, note).flush())


@pytest.mark.usefixtures("arrives")
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_arrives_after_a_restore(kind: str) -> None:
    """What was cleared is not read any more."""
    loop, read = KINDS[kind](), list[int]()
    readback = steps(loop, 4, lambda number, occasion, arrived: read.extend(one.reading.step for one in arrived))
    readback.clear()
    assert list(readback.flush()) == []
    steps(loop, 2, lambda number, occasion, arrived: read.extend(one.reading.step for one in arrived))
    read += [one.reading.step for one in readback.flush()]
    assert read[-2:] == [5, 6]

"""The newest interventions, read like a tuple."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_nanguard.record.memory import Memory
from lightning_nanguard.thresholds.records import RecordsThresholds
from tests.record.data import ROLLBACK, SKIP, step


def filled(count: int, maxlen: int = 3) -> Memory:
    memory = Memory(RecordsThresholds(interventions_in_memory=maxlen))
    for number in range(count):
        memory.write(step(number))
    return memory


@given(count=st.integers(0, 8), maxlen=st.integers(1, 5), index=st.integers(-9, 9), stop=st.integers(-9, 9))
def test_reads_like_a_tuple(count: int, maxlen: int, index: int, stop: int) -> None:
    """Length, index, slice, iteration, containment and equality are those of the newest records."""
    memory = filled(count, maxlen)
    newest = tuple(step(number) for number in range(count))[-maxlen:]
    assert (len(memory), tuple(memory), bool(memory)) == (len(newest), newest, bool(newest))
    assert memory[index:stop] == newest[index:stop]
    assert memory[::-1] == newest[::-1]
    assert list(reversed(memory)) == list(reversed(newest))
    assert memory == newest
    assert memory == list(newest)
    assert memory == filled(count, maxlen)
    assert memory != [*newest, SKIP]
    assert (step(count - 1) in memory) == (count > 0)
    if -len(newest) <= index < len(newest):
        assert memory[index] == newest[index]
    else:
        with pytest.raises(IndexError, match="out of range"):
            memory[index]
    assert (memory.total, memory.maxlen) == (count, maxlen)


def test_counts_survive_what_is_dropped() -> None:
    """The counts are over all interventions, and closing keeps them."""
    memory = filled(10)
    memory.write(ROLLBACK)
    memory.close()
    assert memory.total == 11
    assert memory.faults == {"non_finite_gradient": 10, "exploding_loss": 1}
    assert memory.remedies == {"skip": 10, "restore": 1, "scale": 1}


def test_cannot_be_changed_from_outside() -> None:
    """It has none of the methods of a list, nor a hash, since the guard changes it."""
    memory: Any = filled(2)
    with pytest.raises(TypeError, match="item assignment"):
        memory[0] = SKIP
    with pytest.raises(TypeError, match="unhashable"):
        hash(memory)
    assert not hasattr(memory, "append")
    assert memory != "no sequence of interventions"
    assert memory != 3


def test_may_be_written_to_while_it_is_read() -> None:
    """A loop over it sees what was there when it began."""
    memory = filled(3)
    for _ in memory:
        memory.write(SKIP)
    assert memory.total == 6


def test_repr() -> None:
    """It shows its records and how many are gone."""
    assert repr(filled(1)) == f"Memory([{step(0)!r}])"
    assert repr(filled(4)).endswith("], and 1 older)")


def test_rejects_no_room() -> None:
    """A wrong argument is named with its value."""
    with pytest.raises(ValueError, match="interventions_in_memory=0"):
        Memory(RecordsThresholds(interventions_in_memory=0))


def test_what_is_told_of_a_fit_is_found_from_the_original() -> None:
    """A copy's fit shows on both, a new fit takes the place of the last one, and a state holds it."""
    memory = Memory()
    made = memory.copy()
    made.take_run({"id": "a", "updates": 3})
    made.add_to_run(updates=4)
    assert memory.run == made.run == {"id": "a", "updates": 4}
    made.take_run({"id": "b"})
    assert memory.run == {"id": "b"}
    assert memory.copy().run == {"id": "b"}

"""Taking values apart, and making copies of them."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from types import MappingProxyType
from typing import Any

import pytest
import torch

from lightning_nanguard.measure import containers
from lightning_nanguard.measure.containers import parts_of, remade


@pytest.mark.parametrize(
    "value", [None, "text", 3, 2.5, b"1", int, len, torch.ones(1), torch.float32, range(3), iter([])]
)
def test_what_is_whole(value: Any) -> None:
    """Numbers, strings, types, functions, tensors and iterators have no parts."""
    assert parts_of(value) is None


@pytest.mark.parametrize(
    "value",
    [(1, 2), [1, 2], {1, 2}, frozenset({1, 2}), deque([1, 2], 5), {"a": 1, "b": 2}, OrderedDict(a=1, b=2),
     defaultdict(list, a=1, b=2), Counter(a=1, b=2)],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_a_copy_with_other_parts(value: Any) -> None:
    """It is of the same type, has the parts given in their order, and the original is as it was."""
    before = repr(value)
    parts = parts_of(value)
    assert parts is not None
    copy = remade(value, [part + 10 for _, part in parts])
    assert type(copy) is type(value)
    assert [part for _, part in parts_of(copy) or ()] == [11, 12]
    assert repr(value) == before
    assert getattr(copy, "maxlen", None) == getattr(value, "maxlen", None)


def test_what_cannot_be_made_anew_becomes_the_plain_kind() -> None:
    """A mapping that is read-only becomes a dictionary, and a list whose constructor takes something else a list."""

    class Odd(list[int]):
        def __init__(self, first: int, second: int) -> None:
            super().__init__([first, second])

    proxy = MappingProxyType({"a": 1})
    assert parts_of(proxy) == [("a", 1)]
    assert remade(proxy, [2]) == {"a": 2}
    assert parts_of(Odd(1, 2)) == [(0, 1), (1, 2)]
    assert remade(Odd(1, 2), [3, 4]) == [3, 4]


def test_how_a_type_is_taken_apart_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second value of a type, and a copy of it, need not be looked at as the first one was."""

    class Pair:
        def __init__(self) -> None:
            self.first, self.second = 1, 2

    looked: list[type] = []
    anatomy = containers._anatomy
    monkeypatch.setattr(containers, "_anatomy", lambda kind: (looked.append(kind), anatomy(kind))[1])
    for _ in range(3):
        assert parts_of(Pair()) == [("first", 1), ("second", 2)]
        assert vars(remade(Pair(), [3, 4])) == {"first": 3, "second": 4}
    assert looked == [Pair]

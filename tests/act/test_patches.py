"""Wrapping a method of one object, and taking the wrapper away again."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy
from functools import wraps
from itertools import permutations
from typing import Any
from weakref import ref

import pytest

from lightning_nanguard.act.patches import undo_all, wrap_method, wrapped


class Owner:
    def say(self, word: str) -> str:
        return word


def adding(mark: str) -> Callable[..., str]:
    return lambda original, word: f"{mark}{original(word)}"


def test_a_wrapper_is_called_in_the_methods_place() -> None:
    """One object is changed, no other of its class, and undoing it leaves nothing behind, however often."""
    owner = Owner()
    undo = wrap_method(owner, "say", adding("a"))
    assert owner.say("x") == "ax"
    assert owner.say.__name__ == "say"
    assert Owner().say("x") == "x"
    undo()
    undo()
    assert owner.say("x") == "x"
    assert not vars(owner)


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_wrappers_are_undone_in_any_order(order: tuple[int, ...]) -> None:
    """Whichever is undone first stops acting at once, and at the end what the user had put there is there again."""
    owner: Any = Owner()
    users = owner.say = lambda word: f"u{word}"
    undos = [wrap_method(owner, "say", adding(mark)) for mark in "abc"]
    left = {0: "a", 1: "b", 2: "c"}
    assert owner.say("x") == "cbaux"
    for index in order:
        undos[index]()
        del left[index]
        assert owner.say("x") == "".join(reversed(left.values())) + "ux"
    assert owner.say is users


@pytest.mark.parametrize("by_wraps", [False, True])
def test_what_somebody_else_has_wrapped_since_stays(by_wraps: bool) -> None:
    """Their wrapper stays on the object, and calls through to the method without ours."""
    owner: Any = Owner()
    undo = wrap_method(owner, "say", adding("a"))
    inner = owner.say

    def theirs(word: str) -> str:
        return f"t{inner(word)}"

    if by_wraps:
        theirs = wraps(inner)(theirs)
    owner.say = theirs
    undo()
    assert owner.say is theirs
    assert owner.say("x") == "tx"


def test_a_wrapper_that_is_gone_already() -> None:
    """Where somebody has put something else there, or taken it away, that stays."""
    owner: Any = Owner()
    undo = wrap_method(owner, "say", adding("a"))
    del owner.say
    undo()
    assert not vars(owner)
    undo = wrap_method(owner, "say", adding("a"))
    owner.say = str.upper
    undo()
    assert owner.say is str.upper


def test_inside_a_block() -> None:
    """The method is wrapped inside, and its own again afterwards, also if the block raises."""
    owner = Owner()
    with wrapped(owner, "say", adding("a")):
        assert owner.say("x") == "ax"
    assert not vars(owner)
    with pytest.raises(TypeError, match="str"), wrapped(owner, "say", adding("a")):
        owner.say("x") + 1  # type: ignore[operator]
    assert not vars(owner)


def test_copies_and_pickles_are_without_wrappers() -> None:
    """Of an object that is wrapped, or that somebody has put an undone wrapper back on, a copy has its own method."""
    owner, acting = Owner(), adding("a")
    undo = wrap_method(owner, "say", acting)
    theirs = owner.say
    for copy in (deepcopy(owner), pickle.loads(pickle.dumps(owner))):
        assert copy.say("x") == "x"
        assert copy.say.__self__ is copy
    undo()
    owner.say = theirs  # as somebody does who had wrapped it meanwhile
    assert pickle.loads(pickle.dumps(owner)).say("x") == "x"
    alive = ref(acting)
    del acting, undo
    assert alive() is None


def test_undo_all_goes_backwards_once() -> None:
    """The newest is undone first, each once, also when another undo raises in between."""
    done: list[int] = []

    def fails() -> None:
        raise OSError("first time")

    undo = undo_all([lambda: done.append(0), fails, lambda: done.append(2)])
    with pytest.raises(OSError, match="first time"):
        undo()
    undo()
    undo()
    assert done == [2, 0]

"""Wrapping a method of one object of Lightning or of the user, and taking the wrapper away again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import update_wrapper
from typing import Any, final

_ABSENT = object()


@final
class _Wrapper:
    """Lies on an object in place of a method, and only passes calls on once it is undone.

    Copied and pickled it becomes the method of the copy: neither the wrapper nor whom it acts for goes along.
    """

    # What somebody wraps around it takes over the dictionary, with the method's name in it, and nothing else.
    __slots__ = ("__dict__", "before", "original", "wrapper")

    def __init__(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        self.before = vars(owner).get(name, _ABSENT)
        self.original: Callable[..., Any] = getattr(owner, name)
        self.wrapper: Callable[..., Any] | None = wrapper
        update_wrapper(self, self.original, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.original(*args, **kwargs) if self.wrapper is None else self.wrapper(self.original, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _same, (self.original,)


def _same(value: Any) -> Any:
    return value


def wrap_method(owner: Any, name: str, wrapper: Callable[..., Any]) -> Callable[[], None]:
    """Have ``wrapper`` called in place of a method of one object, until the returned function is called.

    The wrapper lies on the object itself, so that other objects of its class are not touched.

    Args:
        owner: The object.
        name: Name of the method.
        wrapper: Called with the original method first, then with what the method was called with.

    Returns:
        A function that undoes this: what lay on the object before lies there again, in whatever order several wrappers
        are undone. Where somebody else has wrapped this wrapper since, theirs stays, and this one only passes calls on.
        Calling it again does nothing.
    """
    wrapped = _Wrapper(owner, name, wrapper)
    setattr(owner, name, wrapped)

    def undo() -> None:
        wrapped.wrapper = None
        there = current = vars(owner).get(name, _ABSENT)
        while isinstance(current, _Wrapper) and current.wrapper is None:
            current = current.before
        if current is there:
            return
        if current is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, current)

    return undo


def undo_all(undos: list[Callable[[], None]]) -> Callable[[], None]:
    """One function that calls all of several, the newest first; calling it again does nothing."""

    def undo() -> None:
        with ExitStack() as all_of_them:
            for each in undos:
                all_of_them.callback(each)
            undos.clear()

    return undo


def call_nothing(*args: Any, **kwargs: Any) -> None:
    """A wrapper under which a method does nothing."""

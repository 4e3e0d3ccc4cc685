"""Wrapping a method of one object of Lightning or of the user, and taking the wrapper away again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import wraps
from typing import Any

_ABSENT = object()


@dataclass
class _Patch:
    """One wrapper: what lay on the object before, and whether it still acts."""

    before: Any
    active: bool = True
    function: Any = None


def wrap_method(owner: Any, name: str, wrapper: Callable[..., Any]) -> Callable[[], None]:
    """Have ``wrapper`` called in the place of a method of one object, until the returned function is called.

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
    original: Callable[..., Any] = getattr(owner, name)
    patch = _Patch(vars(owner).get(name, _ABSENT))

    @wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs) if patch.active else original(*args, **kwargs)

    patch.function = wrapped
    wrapped.__dict__["_nanguard_patch"] = patch
    setattr(owner, name, wrapped)

    def undo() -> None:
        patch.active = False
        there = current = vars(owner).get(name, _ABSENT)
        while (own := _patch_of(current)) is not None and not own.active:
            current = own.before
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


def _patch_of(function: Any) -> _Patch | None:
    # `functools.wraps` copies the mark to what somebody has wrapped around it, hence the second look.
    patch = getattr(function, "_nanguard_patch", None)
    return patch if isinstance(patch, _Patch) and patch.function is function else None

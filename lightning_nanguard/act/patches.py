"""Wraps a method of one object or the step of an optimizer, and removes the wrapper again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import update_wrapper
from typing import Any, final

from torch.optim import Optimizer

_ABSENT = object()
Before = Callable[[Optimizer, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]
After = Callable[[Optimizer, tuple[Any, ...], dict[str, Any]], None]


@final
class _Wrapper:
    """Replaces a method of an object. Once undone, it only calls the original method.

    A copied or pickled wrapper becomes the plain method of the copy.
    """

    # Slots: functools.wraps around it copies __dict__, which must hold only the method's name.
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
    """Call ``wrapper`` instead of a method of one object, until the returned function is called.

    The wrapper is an attribute of the object itself, so other objects of its class do not change.

    Args:
        owner: The object.
        name: Name of the method.
        wrapper: Called with the original method, followed by the arguments of the call.

    Returns:
        A function that undoes this. Several wrappers can be undone in any order. If somebody else has wrapped this
        wrapper, their wrapper stays, and this one only calls the original method. Calling the function again does
        nothing.
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


@contextmanager
def wrapped(owner: Any, name: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """Inside, call ``wrapper`` instead of a method of one object; see :func:`wrap_method`."""
    undo = wrap_method(owner, name, wrapper)
    try:
        yield
    finally:
        undo()


def undo_all(undos: list[Callable[[], None]]) -> Callable[[], None]:
    """A function that calls all given functions, the newest first. Calling it again does nothing."""

    def undo() -> None:
        with ExitStack() as all_of_them:
            for each in undos:
                all_of_them.callback(each)
            undos.clear()

    return undo


def call_nothing(*args: Any, **kwargs: Any) -> None:
    """A wrapper under which a method does nothing."""


def hook_step(optimizer: Optimizer, before: Before, after: After) -> list[Callable[[], None]]:
    """Call functions before and after each ``optimizer.step``, with the arguments of torch's step hooks.

    A wrapper around another optimizer may be a subclass of ``torch.optim.Optimizer`` that does not call its
    constructor, whatever tables of hooks it sets. Only that constructor lets ``step`` call hooks, so the ``step`` of
    such a wrapper is wrapped.

    Args:
        optimizer: The optimizer.
        before: Called before each step. It returns the positional and keyword arguments of the step.
        after: Called after each step.

    Returns:
        Functions that remove the two again.
    """
    if _calls_hooks(optimizer):
        hooks = optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)
        return [one.remove for one in hooks]

    def step(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        args, kwargs = before(optimizer, (optimizer, *args), kwargs)
        result = original(*args[1:], **kwargs)
        after(optimizer, args, kwargs)
        return result

    known = getattr(optimizer.step, "__dict__", {})
    undo = wrap_method(optimizer, "step", step)
    vars(vars(optimizer)["step"]).update(known)  # schedulers warn if their mark on the step is gone
    return [undo]


def _calls_hooks(optimizer: Optimizer) -> bool:
    """Whether torch has wrapped the step so that it calls hooks, and the optimizer has tables that take them."""
    tables = (getattr(optimizer, f"_optimizer_step_{when}_hooks", None) for when in ("pre", "post"))
    # A plain dictionary takes no hooks, because a handle needs a weak reference to its table.
    return bool(getattr(type(optimizer).step, "hooked", False)) and all(isinstance(one, OrderedDict) for one in tables)

"""Hooks around the step of any optimizer, also of one whose step calls no hooks of torch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from lightning_nanguard.act.patches import wrap_method

Before = Callable[[Optimizer, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]
After = Callable[[Optimizer, tuple[Any, ...], dict[str, Any]], None]


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

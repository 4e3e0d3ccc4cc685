"""Hooks around the step of any optimizer, also of one that has no hooks of torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Protocol, final

from torch.optim import Optimizer

Before = Callable[[Optimizer, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]
After = Callable[[Optimizer, tuple[Any, ...], dict[str, Any]], None]


class Handle(Protocol):
    """Removes hooks; torch's ``RemovableHandle`` is one."""

    def remove(self) -> None:
        """Remove them."""


def hook_step(optimizer: Optimizer, before: Before, after: After) -> list[Handle]:
    """Call functions before and after each ``optimizer.step``, with the arguments of torch's step hooks.

    A wrapper around another optimizer may be a subclass of ``torch.optim.Optimizer`` that does not call its
    constructor. It has no hooks, so its ``step`` is replaced.

    Args:
        optimizer: The optimizer.
        before: Called before each step. It returns the positional and keyword arguments of the step.
        after: Called after each step.

    Returns:
        Handles that remove the functions again.
    """
    if hasattr(optimizer, "_optimizer_step_pre_hooks"):
        return [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
    return [_ReplacedStep(optimizer, before, after)]


@final
class _ReplacedStep:
    """A step with functions around it, in the place of an optimizer's own."""

    def __init__(self, optimizer: Optimizer, before: Before, after: After) -> None:
        self._optimizer = optimizer
        # A scheduler may have replaced the step of this object, too.
        self._own = vars(optimizer).get("step")
        original = optimizer.step

        @wraps(original)
        def step(*args: Any, **kwargs: Any) -> Any:
            (_, *args_now), kwargs = before(optimizer, (optimizer, *args), kwargs)
            result = original(*args_now, **kwargs)
            after(optimizer, (optimizer, *args), kwargs)
            return result

        self._step = step
        vars(optimizer)["step"] = step

    def remove(self) -> None:
        """Restore the step, unless somebody has replaced it since."""
        if vars(self._optimizer).get("step") is not self._step:
            return
        if self._own is None:
            del vars(self._optimizer)["step"]
        else:
            vars(self._optimizer)["step"] = self._own

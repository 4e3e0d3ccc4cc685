"""Suppresses exceptions in the step of an optimizer whose update is skipped."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from torch.optim import Optimizer

from lightning_nanguard.act.patches import wrap_method

_logger = logging.getLogger("lightning_nanguard")


def skipped_steps_raise_nothing(trainer: Any, excuses: Callable[[Optimizer, Exception], bool]) -> Callable[[], None]:
    """End the step of an optimizer without error at an exception that the skip has caused.

    The step consists of hooks, clipping and the optimizer's own computation.

    Args:
        trainer: The trainer.
        excuses: Says whether the skip has caused an exception.

    Returns:
        A function that undoes this.
    """
    return wrap_method(trainer.strategy, "optimizer_step", partial(_step, excuses))


def _step(
    excuses: Callable[[Optimizer, Exception], bool],
    original: Callable[..., Any],
    optimizer: Optimizer,
    *args: Any,
    **kwargs: Any,
) -> Any:
    try:
        return original(optimizer, *args, **kwargs)
    except Exception as error:
        if not excuses(optimizer, error):
            raise
        _logger.debug("NaNGuard: a step of %s that is skipped raised %r.", type(optimizer).__name__, error)
        return None

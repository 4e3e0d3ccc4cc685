"""An error inside the guard does not end the run: the guard leaves the run, which goes on without it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, TypeVar, cast

from lightning_nanguard.diagnosis.isolation import errors_logged
from lightning_nanguard.errors import has_to_be_raised
from lightning_nanguard.trainer.guard_state import StatefulGuard
from lightning_nanguard.trainer.private.closures import MicroBatchRun, is_from_run
from lightning_nanguard.trainer.private.packages import Trainer

_logger = logging.getLogger("lightning_nanguard")

_NO_TRAINER = (
    "NaNGuard.{} was called without a Trainer. It does not support Fabric, nor other loops that call the hooks of "
    "callbacks with arguments of their own. Use a Trainer of pytorch_lightning or lightning.pytorch, or guard your own "
    "loop with a subclass of lightning_nanguard.guard.loop.TrainingLoop."
)
_Hook = TypeVar("_Hook", bound=Callable[..., None])


def leaves_run_if_it_fails(hook: _Hook) -> _Hook:
    """Decorate a hook of the guard, so that an error in it makes the guard leave the run instead of ending it.

    The error is logged with its traceback, and kept as advice. With several ranks it is raised, because the other
    ranks would wait for this one. So are errors that are meant for the user.
    """

    @wraps(hook)
    def wrapped(guard: StatefulGuard, *args: Any, **kwargs: Any) -> None:
        try:
            hook(guard, *args, **kwargs)
        except Exception as error:
            trainer: Any = kwargs.get("trainer", args[0] if args else None)
            if not hasattr(trainer, "fit_loop"):
                raise TypeError(_NO_TRAINER.format(hook.__name__)) from error
            if has_to_be_raised(error, trainer.world_size):
                raise
            leave_run(guard, hook.__name__, error)

    return cast(_Hook, wrapped)


def run_micro_batch(
    guard: StatefulGuard, trainer: Trainer, run: Callable[[MicroBatchRun], Any], micro: MicroBatchRun
) -> Any:
    """Let the guard run a micro-batch. If the guard fails, it leaves the run, and the micro-batch is run without it.

    Args:
        guard: The guard.
        trainer: The trainer.
        run: Runs the micro-batch for the guard; returns the result for Lightning.
        micro: The micro-batch.
    """
    whole, results = micro.whole, []

    def noted() -> Any:
        results.append(whole())
        return results[-1]

    micro.whole = noted
    try:
        return run(micro)
    except Exception as error:
        if is_from_run(error) or has_to_be_raised(error, trainer.world_size):
            raise
        leave_run(guard, "a training step", error)
        # After a second run that broke off, gradients may be missing.
        return results[0] if len(results) == 1 else whole()
    finally:
        micro.whole = whole
        results.clear()


def leave_run(guard: StatefulGuard, hook: str, error: Exception) -> None:
    """Let a guard leave its run because of an error in it. The error is logged, and kept as advice.

    Args:
        guard: The guard.
        hook: Where the error was raised, in words.
        error: The error.
    """
    what = f"the guard failed in {hook} with {type(error).__name__}: {error}"
    _logger.error(
        "NaNGuard: %s. The run goes on without the guard. Please report this with the traceback.", what, exc_info=error
    )
    fit, guard._fit = guard._fit, None
    if fit is None:
        return
    # The error may make each of these fail, too.
    for step in (fit.restore_finite, partial(fit.tell_of_failure, what), fit.say_how_it_went, fit.close):
        with errors_logged("the guard could not leave the run cleanly"):
            step()

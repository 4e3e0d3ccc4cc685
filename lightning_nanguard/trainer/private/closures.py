"""Wraps the closure of automatic optimization: forward, ``zero_grad`` and backward of one micro-batch.

Exceptions in the step of an optimizer whose update is skipped are suppressed.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from traceback import walk_tb
from typing import Any, final

from torch import Tensor
from torch.optim import Optimizer

from lightning_nanguard.act.patches import call_nothing, wrap_method, wrapped
from lightning_nanguard.measure.batches import mapped
from lightning_nanguard.trainer.private.callbacks import IsGuard

_HOOKS = ("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step")


@final
@dataclass(slots=True, eq=False)
class MicroBatchRun:
    """One micro-batch, as Lightning runs it.

    Attributes:
        optimizer: The optimizer that steps with its gradients.
        batch: The batch; ``None`` if ``training_step`` takes batches from the loader by itself.
        batch_idx: Its index in the epoch.
        repeatable: Whether Lightning passes the batch to ``training_step``, so that it can be run again.
        forward: Runs ``training_step``; returns a result with the loss.
        zero_grad: Empties the gradients before backward; ``None`` within a window of accumulation.
        whole: Runs all three.
        give: Replaces the batch in Lightning; :meth:`take` calls it.
    """

    optimizer: Optimizer
    batch: Any
    batch_idx: int
    repeatable: bool
    forward: Callable[[], Any]
    zero_grad: Callable[[], None] | None
    whole: Callable[[], Any]
    give: Callable[[Any], None]

    def take(self, batch: Any) -> None:
        """Use another batch from now on."""
        self.batch = batch
        self.give(batch)


def run_micro_batches_by(
    trainer: Any, run: Callable[[MicroBatchRun], Any], forward: Callable[[Callable[[], Any]], Any]
) -> Callable[[], None]:
    """Let functions of the guard run every micro-batch under automatic optimization.

    Args:
        trainer: The trainer.
        run: Runs a micro-batch at least once with ``micro.whole()``; returns the result.
        forward: Runs the forward pass that it gets, each time that ``micro.whole()`` comes to it; returns the result.

    Returns:
        A function that undoes this.
    """

    def make_closure(original: Callable[..., Any], kwargs: dict[str, Any], optimizer: Optimizer, batch_idx: int) -> Any:
        closure = original(kwargs, optimizer, batch_idx)
        # Copied, because a reference cycle would keep the batch in memory until a garbage collection.
        inner = copy.copy(closure)
        inner._step_fn = partial(forward, closure._step_fn)
        micro = MicroBatchRun(
            optimizer,
            kwargs.get("batch"),
            batch_idx,
            "batch" in kwargs,
            closure._step_fn,
            closure._zero_grad_fn,
            inner.closure,
            partial(kwargs.__setitem__, "batch"),
        )
        closure.closure = lambda *args, **kwargs: run(micro)
        return closure

    return wrap_method(trainer.fit_loop.epoch_loop.automatic_optimization, "_make_closure", make_closure)


def is_from_run(error: BaseException) -> bool:
    """Whether an exception was raised while a micro-batch was run, by the user's code, a callback or Lightning."""
    frames = (frame.f_code for frame, _ in walk_tb(error.__traceback__))
    return any(code.co_name == "closure" and Path(code.co_filename).stem == "automatic" for code in frames)


def accumulates(trainer: Any) -> bool:
    """Whether the present micro-batch is followed by more before the optimizer steps."""
    return bool(trainer.accumulate_grad_batches > 1 and trainer.fit_loop._should_accumulate())


@contextmanager
def accumulating(trainer: Any, count: int) -> Iterator[None]:
    """Inside, an update has another number of micro-batches; a callback may have changed it since."""
    before, trainer.accumulate_grad_batches = trainer.accumulate_grad_batches, count
    try:
        yield
    finally:
        trainer.accumulate_grad_batches = before


def result_of(trainer: Any, loss: Tensor) -> Any:
    """The result of a forward pass with the given loss."""
    loop = trainer.fit_loop.epoch_loop.automatic_optimization
    return loop.output_result_cls.from_training_step_output(loss, trainer.accumulate_grad_batches)


def with_outputs_of(result: Any, first: Any) -> Any:
    """A result of a smaller batch that gives hooks the outputs of the whole batch; the optimizer gets its own loss.

    The outputs hold no graph, because there is no backward pass for it.

    Args:
        result: The result of the smaller batch.
        first: The result of the whole batch.
    """
    made = copy.copy(result)
    made.extra = mapped(first.asdict(), _detached)
    return made


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.requires_grad else tensor


@contextmanager
def uncounted(trainer: Any, is_guard: IsGuard | None) -> Iterator[None]:
    """Inside, a micro-batch is run a second time: no callback is called, and progress is not counted.

    Args:
        trainer: The trainer.
        is_guard: Says whether a callback is the guard, which is still called; ``None`` if it is not called either.
    """
    loop = trainer.fit_loop.epoch_loop.automatic_optimization
    progress = copy.deepcopy(loop.optim_progress.state_dict())
    # The callbacks stay in the trainer's list, because the thread of a progress bar searches it.
    silenced = [one for one in trainer.callbacks if is_guard is None or not is_guard(one)]
    with ExitStack() as last:
        last.callback(loop.optim_progress.load_state_dict, progress)
        for one in silenced:
            for name in _HOOKS:
                last.enter_context(wrapped(one, name, call_nothing))
        yield


def call_after_backward(trainer: Any, is_guard: IsGuard) -> None:
    """Call ``on_after_backward`` of the other callbacks after a repeated backward pass."""
    for callback in trainer.callbacks:
        if not is_guard(callback):
            callback.on_after_backward(trainer, trainer.lightning_module)


def end_backward(trainer: Any, optimizer: Optimizer) -> None:
    """Run the steps between backward and the optimizer: the hooks before its step, and the configured clipping."""
    trainer.precision_plugin._after_closure(trainer.lightning_module, optimizer)


@contextmanager
def logging_for(trainer: Any, batch: Any) -> Iterator[None]:
    """Inside, ``self.log`` uses the size of this batch instead of the present one."""
    results = trainer.fit_loop.epoch_loop._results
    before = results.batch, results.batch_size
    results.batch, results.batch_size = batch, None
    try:
        yield
    finally:
        results.batch, results.batch_size = before


def changes_gradients(trainer: Any, module: Any) -> bool:
    """Whether the user's code may run between backward and ``on_before_optimizer_step``."""
    own = type(module).optimizer_step.__module__.split(".")[0]
    parts = (trainer.strategy, trainer.precision_plugin)
    return any(type(part).__module__.split(".")[0] not in _PACKAGES for part in parts) or own not in _PACKAGES


_PACKAGES = ("pytorch_lightning", "lightning", "lightning_fabric")


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

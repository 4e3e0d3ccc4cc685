"""Runs ``training_step`` outside the loops: forward and backward of one batch, without hooks and counters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_nanguard.act.patches import wrapped
from lightning_nanguard.state.batch_contents import BatchContents
from lightning_nanguard.thresholds.batches import RepeatedStepsThresholds
from lightning_nanguard.trainer.private.strategies import grad_scaler


@final
class BareStep:
    """Runs ``training_step`` in the trainer's precision, without hooks and counters.

    A batch can be run again: what the step removes from its containers is put back.

    Args:
        trainer: The trainer.
        thresholds: Up to which depth the containers are restored.
    """

    def __init__(self, trainer: Any, thresholds: RepeatedStepsThresholds = RepeatedStepsThresholds()) -> None:
        self._trainer = trainer
        self._depth = thresholds.depth

    def loss(self, batch: Any, batch_idx: int) -> float | None:
        """The loss, without backward; ``None`` if the step returns none."""
        loss = self._run(batch, batch_idx)
        return None if loss is None else float(loss.detach())

    def loss_with_graph(self, batch: Any, batch_idx: int, *, full_precision: bool = False) -> Tensor | None:
        """The loss with its graph; ``None`` if the step returns none.

        Args:
            batch: A batch.
            batch_idx: Its index.
            full_precision: Whether to run without autocast.
        """
        if not full_precision:
            return self._run(batch, batch_idx)
        # The precision plugin enters its forward_context, which autocasts, around training_step.
        with wrapped(self._trainer.precision_plugin, "forward_context", lambda original: nullcontext()):
            return self._run(batch, batch_idx)

    def forward_backward(self, optimizer: Optimizer, batch: Any, batch_idx: int) -> float | None:
        """Compute the gradients of a batch; return its loss, or ``None`` if there is none.

        Earlier gradients are removed. The scale of a GradScaler is used but not updated.
        """
        loss = self._run(batch, batch_idx)
        if loss is None:
            return None
        value = float(loss.detach())
        scale = getattr(grad_scaler(self._trainer), "_scale", None)
        optimizer.zero_grad(set_to_none=True)
        (loss if scale is None else loss * scale).backward()
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        for parameter in parameters if scale is not None else ():
            parameter.grad.div_(scale)
        return value

    def _run(self, batch: Any, batch_idx: int) -> Tensor | None:
        from pytorch_lightning.trainer import call

        contents = BatchContents(batch, self._depth)
        try:
            output = call._call_strategy_hook(self._trainer, "training_step", batch, batch_idx)
        finally:
            contents.restore()
        loss = output.get("loss") if isinstance(output, Mapping) else output
        return loss if isinstance(loss, Tensor) else None


@contextmanager
def alone(trainer: Any, silence: Any) -> Iterator[None]:
    """Inside, run the module itself and not its DDP wrapper, so that no rank waits for another.

    Args:
        trainer: The trainer.
        silence: A context in which collectives raise an exception.
    """
    strategy = trainer.strategy
    wrapper = strategy.model
    strategy.model = strategy.lightning_module
    try:
        with silence:
            yield
    finally:
        strategy.model = wrapper


def clip_as_configured(trainer: Any, optimizer: Optimizer) -> None:
    """Clip the present gradients as the trainer is configured to."""
    if not trainer.gradient_clip_val:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    clip_by_value = str(trainer.gradient_clip_algorithm or "norm") in ("value", "GradClipAlgorithmType.VALUE")
    own = torch.nn.utils.clip_grad_value_ if clip_by_value else torch.nn.utils.clip_grad_norm_
    own(parameters, trainer.gradient_clip_val)


def compiled_by_lightning(module: Any) -> bool:
    """Whether a LightningModule was compiled: ``fit`` moves the compiled steps from torch's wrapper to the module."""
    return getattr(module, "_compiler_ctx", None) is not None


@contextmanager
def as_in_training(trainer: Any) -> Iterator[None]:
    """Inside, stage and modules are as in training, and gradients are enabled, also while the Trainer validates."""
    if trainer.training:
        yield
        return
    stage, module = trainer.state.stage, trainer.lightning_module
    training = trainer.fit_loop.epoch_loop.val_loop._module_mode.mode
    modes = [(one, one.training, training.get(name, True)) for name, one in module.named_modules()]
    try:
        trainer.training = True  # selects the loop to which ``self.log`` belongs
        for one, _, trains in modes:
            one.training = trains
        with torch.enable_grad():
            yield
    finally:
        for one, evaluates, _ in modes:
            one.training = evaluates
        trainer.state.stage = stage

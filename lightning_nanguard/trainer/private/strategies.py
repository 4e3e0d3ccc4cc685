"""Knows which strategies the guard supports, which tensors their optimizers step, and the precision plugin."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_nanguard.trainer.private import deepspeed
from lightning_nanguard.trainer.private.packages import is_kind

_DEEPSPEED = "DeepSpeedStrategy"
_SHARDED = ("FSDPStrategy", "ModelParallelStrategy", _DEEPSPEED)


def is_sharded(trainer: Any) -> bool:
    """Whether each rank holds a shard of the parameters."""
    return is_kind(trainer.strategy, *_SHARDED)


def what_steps(trainer: Any, module: nn.Module) -> tuple[list[Optimizer], deepspeed.ZeroPartitions | None]:
    """The torch optimizers, and the partitions that they step if these are not the module's parameters."""
    if not is_kind(trainer.strategy, _DEEPSPEED):
        # Lightning uses an optimizer without groups if a module configures none.
        return [optimizer for optimizer in trainer.optimizers if optimizer.param_groups], None
    (zero,) = trainer.optimizers
    partitions = deepspeed.ZeroPartitions(zero, module)
    return [partitions.optimizer], partitions


def collects(trainer: Any) -> bool:
    """Whether the strategy's save ignores its dictionary and writes the present state."""
    return is_kind(trainer.strategy, _DEEPSPEED)


def step_only_accumulates(trainer: Any) -> bool:
    """Whether the next call of the optimizer's step will only accumulate gradients.

    With DeepSpeed, Lightning calls it after each micro-batch.
    """
    strategy = trainer.strategy
    return is_kind(strategy, _DEEPSPEED) and not strategy.model.is_gradient_accumulation_boundary()


def check_strategy(trainer: Any, module: Any) -> None:
    """Check that the guard supports the trainer's strategy with this module.

    Raises:
        ValueError: If it does not.
    """
    name = type(trainer.strategy).__name__
    if is_kind(trainer.strategy, _DEEPSPEED):
        reason = deepspeed.unsupported(trainer.strategy.config or {}, str(trainer.precision))
        if reason is not None:
            raise ValueError(f"NaNGuard does not support {name} {reason}, or remove the guard from the callbacks.")
    if getattr(trainer.strategy, "_model_averaging_period", None) is not None:
        raise ValueError(
            f"NaNGuard does not support {name}(model_averaging_period=…): the weights of the ranks differ by design "
            "between averages. Turn the averaging off, or remove the guard from the callbacks."
        )
    if is_kind(trainer.strategy, "FSDPStrategy") and not module.automatic_optimization:
        raise ValueError(
            f"NaNGuard does not support {name} with manual optimization: the gradient of a skipped update stays in the "
            "flat parameters that the strategy keeps. Use automatic optimization, ModelParallelStrategy or "
            "strategy='ddp', or remove the guard from the callbacks."
        )
    if trainer.world_size > 1 and not is_kind(trainer.strategy, "DDPStrategy", *_SHARDED):
        raise ValueError(
            f"NaNGuard does not support {name} with {trainer.world_size} processes. Use strategy='ddp', FSDPStrategy "
            "or ModelParallelStrategy, or remove the guard from the callbacks."
        )


def grad_scaler(trainer: Any) -> Any:
    """The GradScaler of ``precision="16-mixed"``, ``None`` without one."""
    return getattr(trainer.precision_plugin, "scaler", None)


def autocasts_to_half(trainer: Any) -> bool:
    """Whether ``training_step`` runs under autocast to float16."""
    plugin = trainer.precision_plugin
    return getattr(plugin, "precision", "") == "16-mixed" and hasattr(plugin, "autocast_context_manager")

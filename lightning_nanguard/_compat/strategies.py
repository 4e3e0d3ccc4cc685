"""Which strategies the guard can work under."""

from __future__ import annotations

from typing import Any

_ONE = ("SingleDeviceStrategy", "SingleDeviceXLAStrategy")
_REPLICATED = ("DDPStrategy",)
_SHARDED = ("FSDPStrategy", "ModelParallelStrategy")


def _is(trainer: Any, names: tuple[str, ...]) -> bool:
    # By name: `lightning` and `pytorch_lightning` each have classes of their own.
    return any(cls.__name__ in names for cls in type(trainer.strategy).__mro__)


def is_sharded(trainer: Any) -> bool:
    """Whether each rank holds a shard of the parameters."""
    return _is(trainer, _SHARDED)


def check_strategy(trainer: Any, module: Any) -> None:
    """Look whether the guard supports the trainer's strategy, with this module.

    Raises:
        ValueError: When it does not.
    """
    name = type(trainer.strategy).__name__
    if _is(trainer, ("DeepSpeedStrategy",)):
        raise ValueError(
            f"NaNGuard does not support {name}: DeepSpeed keeps the weights it trains, their gradients and moments in "
            "partitions of its own, which a snapshot in memory cannot put back exactly. Use strategy='ddp', "
            "FSDPStrategy or ModelParallelStrategy, or take the guard out of the callbacks."
        )
    if getattr(trainer.strategy, "_model_averaging_period", None) is not None:
        raise ValueError(
            f"NaNGuard does not support {name}(model_averaging_period=…): the weights of the ranks part by design "
            "between averages. Leave the averaging out, or take the guard out of the callbacks."
        )
    if _is(trainer, ("FSDPStrategy",)) and not module.automatic_optimization:
        raise ValueError(
            f"NaNGuard does not support {name} with manual optimization: the gradient of a skipped update stays in the "
            "flat parameters that the strategy keeps. Use automatic optimization, ModelParallelStrategy or "
            "strategy='ddp', or take the guard out of the callbacks."
        )
    if trainer.world_size > 1 and not _is(trainer, (*_REPLICATED, *_SHARDED)):
        raise ValueError(
            f"NaNGuard does not support {name} with {trainer.world_size} processes. Use strategy='ddp', FSDPStrategy "
            "or ModelParallelStrategy, or take the guard out of the callbacks."
        )

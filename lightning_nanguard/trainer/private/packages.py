"""Supports both packages of Lightning, ``pytorch_lightning`` and ``lightning.pytorch``, which have separate classes."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info

if TYPE_CHECKING:
    GuardCallback = Callback
else:

    def _base() -> type:
        # LightningCLI accepts only callbacks of its own package.
        try:
            present = find_spec("lightning.pytorch") is not None
        except ModuleNotFoundError:
            present = False
        if not present:
            return Callback
        from lightning.pytorch import Callback as OtherCallback

        if OtherCallback is Callback:
            return Callback
        return type("GuardCallback", (Callback, OtherCallback), {"__doc__": "A callback of both packages."})

    GuardCallback = _base()

__all__ = [
    "GuardCallback",
    "LightningModule",
    "Trainer",
    "is_kind",
    "is_module_class",
    "logged_at",
    "logs_every",
    "package_of",
    "rank_zero_info",
]


def logged_at(trainer: Any) -> int:
    """The step that loggers get from LearningRateMonitor; ``global_step`` if Lightning lacks it."""
    loop = getattr(getattr(trainer, "fit_loop", None), "epoch_loop", None)
    step = getattr(loop, "_batches_that_stepped", None)
    return int(step) if step is not None else int(trainer.global_step)


def logs_every(trainer: Any) -> int:
    """Number of steps from one logged step to the next; 0 if none is logged."""
    return int(getattr(trainer, "log_every_n_steps", 0))


def package_of(module_class: Any) -> ModuleType:
    """The Lightning package of a class."""
    names = {cls.__module__.split(".")[0] for cls in getattr(module_class, "__mro__", ())}
    return import_module("lightning.pytorch" if "lightning" in names else "pytorch_lightning")


def is_kind(value: object, *names: str) -> bool:
    """Whether an object is an instance of a Lightning class with one of these names, in either package.

    Args:
        value: The object.
        names: Names of classes, such as ``"MLFlowLogger"``. Nothing is imported.
    """
    return any(kind.__name__ in names for kind in type(value).__mro__)


def is_module_class(value: Any) -> bool:
    """Whether a value is a subclass of LightningModule, of either package."""
    return isinstance(value, type) and issubclass(value, package_of(value).LightningModule)

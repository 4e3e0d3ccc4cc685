"""Both names of Lightning: ``pytorch_lightning`` and ``lightning.pytorch``, whose classes are not each other's."""

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
        # LightningCLI checks the class: it takes callbacks of its own package only.
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
    "Callback",
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
    """The step loggers are told, as LearningRateMonitor tells it; ``global_step`` where that is gone."""
    loop = getattr(getattr(trainer, "fit_loop", None), "epoch_loop", None)
    step = getattr(loop, "_batches_that_stepped", None)
    return int(step) if step is not None else int(trainer.global_step)


def logs_every(trainer: Any) -> int:
    """How many steps lie between two that are logged; 0 if none is."""
    return int(getattr(trainer, "log_every_n_steps", 0))


def package_of(module_class: Any) -> ModuleType:
    """The one of the two packages that a class belongs to."""
    names = {cls.__module__.split(".")[0] for cls in getattr(module_class, "__mro__", ())}
    return import_module("lightning.pytorch" if "lightning" in names else "pytorch_lightning")


def is_kind(value: object, *names: str) -> bool:
    """Whether an object is of a class of Lightning with one of these names, or of one made from it, of either package.

    Args:
        value: The object.
        names: Such as ``"MLFlowLogger"``. Its package need not be installed, and none is imported.
    """
    return any(kind.__name__ in names for kind in type(value).__mro__)


def is_module_class(value: Any) -> bool:
    """Whether it is a class of LightningModules, of either package."""
    return isinstance(value, type) and issubclass(value, package_of(value).LightningModule)

"""A Trainer for a look from outside a run: it comes as far as the first batch, writes nothing, and ends there."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from lightning_nanguard.trainer.private.packages import GuardCallback

# What of a configuration's trainer bears on one step; the rest would write, wait or spread over devices.
_KEPT = {
    "accelerator",
    "accumulate_grad_batches",
    "deterministic",
    "gradient_clip_algorithm",
    "gradient_clip_val",
    "limit_train_batches",
    "max_epochs",
    "max_steps",
    "overfit_batches",
    "plugins",
    "precision",
}
_FIXED = {
    "callbacks": None,
    "devices": 1,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "limit_val_batches": 0,
    "logger": False,
    "num_sanity_val_steps": 0,
}
# What `fit` takes beside the parts of a configuration.
_OF_FIT = ("ckpt_path", "weights_only")

Look = Callable[[Any, Any, Any, int], None]


class _SeenEnough(Exception):  # noqa: N818
    """Ends a fit from inside."""


class _AtFirstBatch(GuardCallback):
    """Looks, and ends the fit before the first step."""

    def __init__(self, look: Look) -> None:
        super().__init__()
        self._look = look

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._look(trainer, pl_module, batch, batch_idx)
        raise _SeenEnough


def at_first_batch(trainer: Any, module: Any, look: Look, **data: Any) -> None:
    """Come as far as the first batch, look, and end there.

    Args:
        trainer: A trainer from this file.
        module: The module.
        look: Called with trainer, module, batch and its index, before the first step.
        data: What ``trainer.fit`` takes: ``datamodule`` or ``train_dataloaders``.
    """
    trainer.callbacks.append(_AtFirstBatch(look))
    try:
        trainer.fit(module, **data)
    except _SeenEnough:
        return


def package_of(module_class: Any) -> ModuleType:
    """The package of Lightning a class belongs to."""
    names = {cls.__module__.split(".")[0] for cls in getattr(module_class, "__mro__", ())}
    return import_module("lightning.pytorch" if "lightning" in names else "pytorch_lightning")


class _Alone:
    """A source of one batch; a list would be taken for a list of sources."""

    def __init__(self, batch: Any) -> None:
        self._batch = batch

    def __iter__(self) -> Iterator[Any]:
        yield self._batch

    def __len__(self) -> int:
        return 1


def one_batch(module: Any, batch: Any, look: Look, *, precision: str = "32-true") -> None:
    """Give a module one batch as it is, without the hooks that would change it on its way, and look.

    Args:
        module: The module.
        batch: The batch, as ``training_step`` gets it.
        look: See :func:`at_first_batch`.
        precision: The trainer's.
    """
    trainer = package_of(type(module)).Trainer(
        **{**_FIXED, "accelerator": "cpu", "max_epochs": 1, "precision": precision}
    )
    # On the instances: both are gone with this trainer.
    module._on_before_batch_transfer = lambda given, dataloader_idx=0: given
    trainer.strategy.batch_to_device = lambda given, device=None, dataloader_idx=0: given
    try:
        at_first_batch(trainer, module, look, train_dataloaders=_Alone(batch))
    finally:
        del module._on_before_batch_transfer


def from_config(path: Path, model: Any = None, data: Any = None) -> tuple[Any, Any, Any]:
    """Trainer, module and data module (``None`` without one) of a LightningCLI configuration.

    Args:
        path: The YAML file.
        model: Class of the module, where the configuration names none.
        data: Class of the data module, where the configuration names none.

    Raises:
        ModuleNotFoundError: When the extra ``cli`` is not installed.
        ValueError: When the file is no such configuration.
    """
    try:
        import_module("jsonargparse")
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "A LightningCLI configuration needs jsonargparse, which is not installed: "
            "pip install 'lightning-nanguard[cli]'."
        ) from None
    config = import_module("yaml").safe_load(path.read_text(encoding="utf-8"))
    if isinstance(config, dict) and isinstance(config.get("fit"), dict):
        config = {**{key: value for key, value in config.items() if key != "fit"}, **config["fit"]}
    if not isinstance(config, dict) or not isinstance(config.get("model", {}), dict):
        raise ValueError(f"{path} is no configuration of LightningCLI: it has no section 'model'.")
    if model is None and "class_path" not in config.get("model", {}):
        raise ValueError(f"{path} names no class for the model: give it with --model package.file:Class.")
    config = {key: value for key, value in config.items() if key not in _OF_FIT}
    kept = {key: value for key, value in (config.get("trainer") or {}).items() if key in _KEPT}
    config["trainer"] = {**kept, **_FIXED}
    if data is None and "class_path" not in (config.get("data") or {}):
        config.pop("data", None)
    owner = model if model is not None else _imported(config["model"]["class_path"])
    command = import_module(f"{package_of(owner).__name__}.cli").LightningCLI(
        model, data, save_config_callback=None, seed_everything_default=0, args=config, run=False
    )
    return command.trainer, command.model, command.datamodule


def _imported(class_path: str) -> Any:
    home, _, name = class_path.rpartition(".")
    return getattr(import_module(home), name)


@contextmanager
def silent() -> Iterator[None]:
    """Keep Lightning's greetings and hints away from what a command prints."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

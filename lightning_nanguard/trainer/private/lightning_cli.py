"""Builds trainer, module and data of a LightningCLI configuration, for commands that check a run."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from lightning_nanguard.trainer.private.first_batch import QUIET
from lightning_nanguard.trainer.private.packages import package_of

# Trainer options that affect a single step. The others could write files, wait or use several devices.
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
# Arguments of `fit` that a configuration may hold.
_OF_FIT = ("ckpt_path", "weights_only")


def from_config(path: Path, model: Any = None, data: Any = None) -> tuple[Any, Any, Any]:
    """Trainer, module and data module (``None`` without one) of a LightningCLI configuration.

    Args:
        path: The YAML file.
        model: Class of the module, if the configuration names none.
        data: Class of the data module, if the configuration names none.

    Raises:
        ModuleNotFoundError: If the extra ``cli`` is not installed.
        ValueError: If the file is no such configuration.
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
    config["trainer"] = {**kept, **QUIET}
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

"""Trainer, module and data of a LightningCLI configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_nanguard.trainer.private.first_batch import without_messages
from lightning_nanguard.trainer.private.lightning_cli import from_config

pytest.importorskip("jsonargparse")
DEMO = "pytorch_lightning.demos.boring_classes.BoringModel"


def written(folder: Path, content: Any) -> Path:
    path = folder / "config.yaml"
    path.write_text(json.dumps(content))  # JSON is YAML
    return path


@pytest.mark.parametrize("nested", [False, True])
def test_what_of_a_configuration_counts(nested: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options that bear on one step are kept; what would write, wait or spread over devices is turned off."""
    monkeypatch.setattr("sys.argv", ["nanguard"])
    trainer_options = {"accelerator": "cpu", "accumulate_grad_batches": 3, "devices": 4, "logger": True}
    content: Any = {"model": {"class_path": DEMO}, "trainer": trainer_options, "ckpt_path": "last", "data": {"x": 1}}
    with without_messages():  # as the command does
        trainer, module, data = from_config(written(tmp_path, {"fit": content} if nested else content))
    assert type(module).__name__ == "BoringModel"
    assert data is None
    assert (trainer.accumulate_grad_batches, trainer.num_devices, trainer.loggers) == (3, 1, [])
    assert trainer.checkpoint_callback is None


@pytest.mark.parametrize(
    ("content", "said"),
    [([1], "it has no section 'model'"), ({"model": 3}, "it has no section 'model'"), ({}, "names no class")],
)
def test_what_is_no_configuration(content: Any, said: str, tmp_path: Path) -> None:
    """A file that is no configuration, or names no class, is refused with what is missing."""
    with pytest.raises(ValueError, match=said):
        from_config(written(tmp_path, content))

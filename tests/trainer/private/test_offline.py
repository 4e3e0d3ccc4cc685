"""A Trainer for a look from outside a run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning import Trainer

from lightning_nanguard.trainer.private.offline import from_config, one_batch, package_of, silent
from tests.helpers import batches, copied, differences, task


def test_one_batch_is_looked_at_and_nothing_is_trained() -> None:
    """The module comes as far as the batch, with a trainer, and is as before."""
    module, batch, seen = task(), batches(count=1)[0], list[Any]()
    before = copied(dict(module.state_dict()))
    with silent():
        one_batch(module, batch, lambda trainer, given, *rest: seen.append((type(trainer), given, rest)))
    assert seen == [(Trainer, module, (batch, 0))]
    assert differences(before, dict(module.state_dict())) == []
    assert "_on_before_batch_transfer" not in vars(module)


def test_the_package_of_a_class() -> None:
    """It is told by the classes it is made of."""
    assert package_of(type(task())).__name__ == "pytorch_lightning"
    lightning = pytest.importorskip("lightning.pytorch")
    assert package_of(lightning.LightningModule).__name__ == "lightning.pytorch"


@pytest.mark.parametrize(
    ("text", "message"),
    [("a list", "is no configuration of LightningCLI"), ("model: {}", "names no class for the model")],
)
def test_a_file_that_is_no_configuration(text: str, message: str, tmp_path: Path) -> None:
    """The error says what is missing."""
    pytest.importorskip("jsonargparse")
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        from_config(tmp_path / "config.yaml")


def test_silence_ends() -> None:
    """Lightning's loggers speak again afterwards."""
    logger = logging.getLogger("pytorch_lightning")
    before = logger.level
    with silent():
        assert logger.level == logging.ERROR
    assert logger.level == before

"""Both names of Lightning."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lightning_nanguard.trainer.private.packages import GuardCallback, logged_at
from tests.helpers import trainer_for


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_the_guard_is_a_callback_of_either_package(package: str) -> None:
    """LightningCLI of a package takes callbacks of its own package only."""
    assert issubclass(GuardCallback, pytest.importorskip(package).Callback)


def test_the_step_loggers_are_told() -> None:
    """It is the count of batches that stepped; where that is gone, ``global_step``."""
    trainer = trainer_for()
    trainer.fit_loop.epoch_loop._batches_that_stepped = 5
    assert logged_at(trainer) == 5
    assert logged_at(SimpleNamespace(global_step=7)) == 7

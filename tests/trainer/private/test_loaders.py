"""Where a run's training data comes from."""

from __future__ import annotations

from typing import Any

import pytest
from torch.utils.data import DataLoader

from lightning_nanguard.trainer.private.loaders import readable_loader
from tests.helpers import Task, batches, fit, mlp


class Moves(Task):
    """Changes each batch on its way."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


@pytest.mark.parametrize(("kind", "readable"), [(Task, True), (Moves, False)])
def test_data_is_readable_unless_something_changes_it(kind: type[Task], readable: bool) -> None:
    """The loader is given out only where the module is given its batches as they are."""
    loader = DataLoader(batches(count=2), batch_size=None)
    run = fit(kind(mlp()), loader)
    assert readable_loader(run.trainer, run.module) is (loader if readable else None)

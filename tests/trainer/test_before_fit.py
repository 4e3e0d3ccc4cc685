"""The guard lets go of the loaders whatever becomes of the fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning import Callback
from torch.utils.data import DataLoader

from lightning_nanguard import NaNGuard
from tests.helpers import batches, fit, samples, task


class Breaks(Callback):
    def __init__(self, hook: str) -> None:
        setattr(self, hook, self._break)

    def _break(self, *args: Any, **kwargs: Any) -> None:
        raise OSError("broken")


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_batch_start", "on_train_end"])
def test_a_fit_that_breaks_leaves_the_loader_as_it_was(hook: str, tmp_path: Path) -> None:
    """Before the first step, within the fit or at its end: nothing of the guard's stays on the loader."""
    loader = DataLoader(samples(batches()), batch_size=8)
    guard = NaNGuard(dirpath=tmp_path)
    with pytest.raises(OSError, match="broken"):
        fit(task(), loader, guard, callbacks=[Breaks(hook)])
    assert guard._before.order is None
    assert "_get_iterator" not in vars(loader)
    assert type(loader.batch_sampler).__module__ == "torch.utils.data.sampler"

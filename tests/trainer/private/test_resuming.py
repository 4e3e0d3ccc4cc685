"""Looking at the checkpoint a fit is resumed from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from lightning_nanguard.trainer.private.resuming import before_resuming
from tests.helpers import batches, fit, task, trainer_for

pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")


class Choose:
    """Notes what it is asked, and gives one answer."""

    def __init__(self, answer: Path | None) -> None:
        self.answer = answer
        self.asked: list[tuple[Path, bool, bool]] = []

    def __call__(self, path: Path, content: Mapping[str, Any] | None, error: Exception | None) -> Path | None:
        self.asked.append((path, content is not None, error is not None))
        return self.answer


def test_who_decides_what_a_fit_is_resumed_from(tmp_path: Path) -> None:
    """The judge is asked once per resumed fit, whether the file could be loaded or not, and another file may take its
    place; afterwards nothing is left on the trainer."""
    good, torn = tmp_path / "good.ckpt", tmp_path / "torn.ckpt"
    fit(task(), batches(count=3), folder=tmp_path).trainer.save_checkpoint(good)
    torn.write_bytes(good.read_bytes()[:100])
    data = DataLoader(batches(count=3), batch_size=None)
    trainer = trainer_for(tmp_path, max_epochs=2, limit_val_batches=0)
    for path, answer, asked in (
        (None, None, []),
        (good, None, [(good, True, False)]),
        (good, good, [(good, True, False)]),
        (torn, good, [(torn, False, True)]),
    ):
        judge = Choose(answer)
        undo = before_resuming(trainer, judge)
        trainer.fit(task(), data, data, ckpt_path=path)
        assert judge.asked == asked
        assert trainer.global_step == 6
        undo()
        assert "resume_start" not in vars(trainer._checkpoint_connector)
    undo = before_resuming(trainer, Choose(None))
    with pytest.raises(Exception, match="failed finding central directory"):
        trainer.fit(task(), data, data, ckpt_path=torn)
    undo()

"""A look at the checkpoint a fit is about to go on from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lightning_nanguard.trainer.private.resuming import before_resuming
from tests.helpers import batches, fit, task, trainer_for


def test_the_judge_sees_what_was_loaded_and_may_choose_another(tmp_path: Path) -> None:
    """It is asked with the content, or with the error; what it chooses is gone on from; undone, it is not asked."""
    good, torn = tmp_path / "good.ckpt", tmp_path / "torn.ckpt"
    fit(task(), batches(count=3)).trainer.save_checkpoint(good)
    torn.write_bytes(good.read_bytes()[:500])
    seen: list[tuple[str, int | None, bool]] = []

    def judge(path: Path, content: Mapping[str, Any] | None, error: Exception | None) -> Path | None:
        seen.append((path.name, None if content is None else content["global_step"], error is not None))
        return good if error is not None else None

    trainer = trainer_for(tmp_path)
    undo = before_resuming(trainer, judge)
    connector = trainer._checkpoint_connector
    connector.resume_start(None)
    connector.resume_start(str(good))
    connector.resume_start(str(torn))
    assert seen == [("good.ckpt", 3, False), ("torn.ckpt", None, True)]
    assert connector._loaded_checkpoint["global_step"] == 3
    undo()
    with pytest.raises(RuntimeError, match="PytorchStreamReader failed"):
        connector.resume_start(str(torn))
    assert len(seen) == 2

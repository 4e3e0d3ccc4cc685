"""Batches are seen and run again without a trace in the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_nanguard import (
    NaNGuard,
)
from lightning_nanguard.trainer.batch_replay import TrainerBatchReplay
from tests.helpers import (
    FaultAt,
    data_for,
    fit,
    task,
    words,
)
from tests.scenarios.struck import NAN, adam


def test_a_batch_that_comes_back_is_not_compared_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that is bad for the same reason in every epoch is looked into at first, then more and more rarely; each
    is skipped and on record all the same."""
    looks: list[int] = []
    probe = TrainerBatchReplay.probe

    def counted(self: TrainerBatchReplay) -> float | None:
        looks.append(1)
        return probe(self)

    monkeypatch.setattr(TrainerBatchReplay, "probe", counted)
    bad = list(range(10, 400, 10))
    guard = NaNGuard(snapshot_every_n_steps=5)
    fault = FaultAt("loss", NAN, bad)
    fit(task("norm", adam), data_for("norm", 400), guard, folder=tmp_path, callbacks=[fault])
    assert words(guard) == [("skip",)] * len(bad)
    assert len({(one.fault, one.cause) for one in guard.interventions}) == 1
    assert len(looks) == 2 * len([n for n in range(len(bad)) if n <= 4 or n & (n - 1) == 0])

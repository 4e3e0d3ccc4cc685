"""One bad sample in a hundred costs itself: it is named, left out, and the run ends as good as without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_nanguard import NaNGuard, sample_hash
from tests.helpers import batches, differences, fit, samples, seed_all, state_of, task, trainer_for
from tests.scenarios.one_percent import BAD, NOT_FINITE, LogModel, Stream, clean, guard_of, met, spoilt


def shuffled(data: Any, size: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(data, batch_size=size, shuffle=True, generator=torch.Generator().manual_seed(3), **options)


def train(loader: DataLoader[Any], folder: Path, guard: NaNGuard | None, **options: Any) -> LogModel:
    module = LogModel()
    seed_all()
    trainer_for(folder, guard, **({"max_epochs": 2} | options)).fit(module, loader)
    return module


RUNS: dict[str, dict[str, Any]] = {
    "alone": {},
    "large batches": {"size": 256},
    "workers": {"num_workers": 2, "persistent_workers": True},
    "accumulated": {"accumulate_grad_batches": 4},
    "kept": {"keep": True},
    "kept and accumulated": {"keep": True, "accumulate_grad_batches": 4},
    "deferred": {"readback": "deferred"},
}


@pytest.mark.parametrize("name", RUNS)
def test_named_in_the_first_epoch_and_left_out_in_the_second(name: str, tmp_path: Path) -> None:
    """Every row that is not finite is listed by the end of the first epoch, no good one is, and then all is quiet."""
    options = dict(RUNS[name])
    size, keep = options.pop("size", 16), options.pop("keep", False)
    guard = guard_of(tmp_path, keep=keep)
    if options.pop("readback", ""):
        guard = NaNGuard(dirpath=tmp_path, quarantine=True, readback="deferred")
    workers = {key: options.pop(key) for key in ("num_workers", "persistent_workers") if key in options}
    train(shuffled(spoilt(), size, **workers), tmp_path, guard, **options)
    listed = {one.row for one in met(guard, epoch=0)}
    assert NOT_FINITE <= listed <= set(BAD)
    assert {one.row for one in met(guard)} <= set(BAD)
    assert {one.epoch for one in guard.interventions} == {0}


@pytest.mark.parametrize("size", [16, 256])
def test_a_stream(size: int, tmp_path: Path) -> None:
    """Data without rows: the same by the hashes of the samples."""
    guard, data = guard_of(tmp_path), spoilt()
    train(DataLoader(Stream(data), batch_size=size), tmp_path, guard)
    hashes = {sample_hash(sample): row for row, sample in enumerate(data)}
    listed = {hashes[one.hash] for one in met(guard, epoch=0)}
    assert NOT_FINITE <= listed <= set(BAD)
    assert all(one.batch * size + one.index == hashes[one.hash] for one in met(guard, epoch=0))
    assert {one.epoch for one in guard.interventions} == {0}


def test_a_resumed_run(tmp_path: Path) -> None:
    """What the first part of a run has found is left out by the second from its first batch on."""
    first, second = guard_of(tmp_path / "a"), guard_of(tmp_path / "b")
    trainer = trainer_for(tmp_path, first, max_epochs=1)
    trainer.fit(LogModel(), shuffled(spoilt(), 16))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert NOT_FINITE <= {one.row for one in met(first)} <= set(BAD)
    trainer_for(tmp_path, second, max_epochs=2).fit(
        LogModel(), shuffled(spoilt(), 16, num_workers=1), ckpt_path=tmp_path / "end.ckpt"
    )
    assert len(second.interventions) == 0


def test_large_batches_end_as_good_as_without_the_bad_rows(tmp_path: Path) -> None:
    """Where every batch of 256 holds bad samples, skipping learns nothing; with either option the run ends as good."""
    good = [sample for row, sample in enumerate(clean()) if row not in BAD]
    ends = {"clean": train(shuffled(good, 256), tmp_path, None, max_epochs=30).held_out()}
    for name, keep, quarantine in (("kept", True, False), ("quarantine", False, True), ("both", True, True)):
        guard = guard_of(tmp_path / name, keep=keep, quarantine=quarantine)
        ends[name] = train(shuffled(spoilt(), 256), tmp_path, guard, max_epochs=30).held_out()
        assert {one.row for one in met(guard)} == set(BAD)
    # Four updates of 120 go to finding the samples where they are only left out.
    assert ends["kept"] < 1.1 * ends["clean"]
    assert ends["both"] < 1.1 * ends["clean"]
    assert ends["quarantine"] < 1.5 * ends["clean"]
    assert ends["clean"] < 0.01


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_healthy_run_is_the_same_with_all_of_it_on(workers: int, accumulate: int, tmp_path: Path) -> None:
    """Bit by bit: weights, moments, statistics, logged values and every random stream."""
    ends = []
    for guard in (None, guard_of(tmp_path / "guard", keep=True)):
        data = samples(batches("images", count=12))
        loader = DataLoader(data, batch_size=8, shuffle=True, num_workers=workers)
        options = {"max_epochs": 3, "accumulate_grad_batches": accumulate}
        ends.append(state_of(fit(task("cnn", metric=True), loader, guard, folder=tmp_path, **options)))
    assert differences(*ends) == []

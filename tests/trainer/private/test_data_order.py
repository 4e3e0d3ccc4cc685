"""The rows of each batch are known, and the order of data and random numbers stays as it was."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler

from lightning_nanguard import NaNGuard
from lightning_nanguard.state.batch_history import row_of
from lightning_nanguard.trainer.private.data_order import changes_batches, readable_loader
from tests.helpers import fit, task, trainer_for

ROWS = 40


class Numbered(Dataset[Any]):
    """Samples that hold their own row."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(6, generator=torch.Generator().manual_seed(row))
        x[0] = row / ROWS
        return x, torch.zeros(2)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return (Numbered()[row] for row in range(ROWS))


def rows_in(batch: Any) -> list[int]:
    return [round(float(one) * ROWS) for one in batch[0][:, 0]]


class Compares(Callback):
    """Notes of each batch what it holds, and what the guard takes it for."""

    def __init__(self, guard: NaNGuard) -> None:
        self.guard = guard
        self.held: list[list[int]] = []
        self.told: list[Any] = []

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
        assert self.guard._fit is not None
        self.held.append(rows_in(batch))
        self.told.append(self.guard._fit.order.origin(index))


class Plain(Callback):
    def __init__(self) -> None:
        self.held: list[list[int]] = []

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
        self.held.append(rows_in(batch))


LOADERS: dict[str, dict[str, Any]] = {
    "in order": {"batch_size": 8},
    "shuffled": {"batch_size": 6, "shuffle": True},
    "drop last": {"batch_size": 7, "shuffle": True, "drop_last": True},
    "own generator": {"batch_size": 8, "shuffle": True, "generator": 5},
    "batch sampler": {"batch_sampler": True},
    "workers": {"batch_size": 6, "shuffle": True, "num_workers": 2},
    "persistent": {"batch_size": 6, "shuffle": True, "num_workers": 2, "persistent_workers": True},
}


def loader_of(kind: str) -> DataLoader[Any]:
    options = dict(LOADERS[kind])
    if "generator" in options:
        options["generator"] = torch.Generator().manual_seed(options["generator"])
    if "batch_sampler" in options:
        options["batch_sampler"] = BatchSampler(RandomSampler(range(ROWS)), 9, drop_last=False)
    return DataLoader(Numbered(), **options)


@pytest.mark.parametrize("kind", LOADERS)
def test_rows_of_every_batch(kind: str, tmp_path: Path) -> None:
    """The rows are those the batch holds, in two fits of three epochs, and the order is that without the guard."""
    loader, guard, bare = loader_of(kind), NaNGuard(dirpath=tmp_path), Plain()
    fit(task(), loader_of(kind), callbacks=[bare], max_epochs=3)
    own = loader.batch_sampler
    for number in range(2):
        seen = Compares(guard)
        fit(task(), loader, guard, callbacks=[seen], max_epochs=3)
        assert [list(map(row_of, one.keys)) for one in seen.told] == seen.held
        assert [one.position for one in seen.told] == list(range(len(seen.held) // 3)) * 3
        assert all(one.collated for one in seen.told)
        if number == 0:
            assert seen.held == bare.held
        assert loader.batch_sampler is own
        assert "_get_iterator" not in vars(loader)
        iterator: Any = loader._iterator
        assert iterator is None or iterator._index_sampler is own


WITHOUT_ROWS: dict[str, Any] = {
    "iterable": lambda: DataLoader(Stream(), batch_size=8),
    "out of order": lambda: DataLoader(Numbered(), batch_size=8, num_workers=1, in_order=False),
    "whole batches": lambda: DataLoader([Numbered()[row] for row in range(5)], batch_size=None),
}


class Simple(LightningModule):
    """Trains on whatever holds inputs of six numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 1)

    def training_step(self, batch: Any, index: int) -> Tensor:
        x = batch["a"][0] if isinstance(batch, dict) else batch[0]
        return self.net(x).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Places(Callback):
    """Notes where the guard takes each batch to come from."""

    def __init__(self, guard: NaNGuard) -> None:
        self.guard = guard
        self.told: list[Any] = []

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
        assert self.guard._fit is not None
        self.told.append(self.guard._fit.order.origin(index))


@pytest.mark.parametrize("kind", WITHOUT_ROWS)
def test_place_where_there_are_no_rows(kind: str, tmp_path: Path) -> None:
    """A loader without rows has the position of each batch in its epoch."""
    guard = NaNGuard(dirpath=tmp_path)
    seen = Places(guard)
    trainer_for(tmp_path, guard, [seen], max_epochs=2).fit(Simple(), WITHOUT_ROWS[kind]())
    assert [(one.epoch, one.position) for one in seen.told] == [
        (epoch, place) for epoch in (0, 1) for place in range(5)
    ]
    assert all(one.keys is None for one in seen.told)


def test_several_loaders_have_no_rows(tmp_path: Path) -> None:
    """Where a batch comes from several loaders, some of which may begin anew, only Lightning's index is told."""
    guard = NaNGuard(dirpath=tmp_path)
    seen = Places(guard)
    trainer = trainer_for(tmp_path, guard, [seen])
    trainer.fit(Simple(), {"a": loader_of("in order"), "b": loader_of("shuffled")})
    assert [(one.position, one.keys) for one in seen.told] == [(place, None) for place in range(7)]


class Draws:
    """A batch sampler that gives what data sets take, which need not be lists of rows."""

    def __init__(self, make: Any) -> None:
        self.make = make

    def __iter__(self) -> Iterator[Any]:
        return map(self.make, torch.randperm(ROWS).split(4))

    def __len__(self) -> int:
        return ROWS // 4


class Indexed(Dataset[Any]):
    """Takes a whole batch of keys at once."""

    def __getitems__(self, keys: Any) -> list[Any]:
        return [Numbered()[int(row)] for row in keys]

    def __getitem__(self, row: int) -> Any:
        return Numbered()[row]

    def __len__(self) -> int:
        return ROWS


KEYS: dict[str, Any] = {
    "tensors": lambda keys: keys,
    "arrays": lambda keys: keys.numpy(),
    "one row": lambda keys: keys[:1],
    "iterators": iter,
}


@pytest.mark.parametrize("quarantine", [False, True])
@pytest.mark.parametrize("kind", KEYS)
def test_keys_of_any_kind(kind: str, quarantine: bool, tmp_path: Path) -> None:
    """A sampler may draw tensors, arrays or iterators: the run is the same with and without the guard."""
    ends = []
    for guard in (None, NaNGuard(dirpath=tmp_path, quarantine=quarantine)):
        torch.manual_seed(0)
        module, seen = Simple(), Plain()
        trainer = trainer_for(tmp_path, guard, [seen], max_epochs=2)
        trainer.fit(module, DataLoader(Indexed(), batch_sampler=Draws(KEYS[kind])))  # type: ignore[arg-type]
        ends.append((seen.held, module.net.weight.tolist()))
        assert trainer.global_step == 2 * ROWS // 4
    assert ends[0] == ends[1]


def test_loaders_that_are_replaced_are_let_go(tmp_path: Path) -> None:
    """Where each epoch has a loader of its own, only that of the epoch at hand is kept."""

    class Reloads(Simple):
        def train_dataloader(self) -> Any:
            made.append(weakref.ref(loader := loader_of("shuffled")))
            return loader

    class Counts(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
            alive.append(sum(one() is not None for one in made))

    made: list[Any] = []
    alive: list[int] = []
    guard = NaNGuard(dirpath=tmp_path)
    trainer = trainer_for(tmp_path, guard, [Counts()], max_epochs=5, reload_dataloaders_every_n_epochs=1)
    trainer.fit(Reloads())
    gc.collect()
    assert len(made) == 5
    assert max(alive) <= 3, "the cycle of the loader before may not be collected yet"
    assert sum(one() is not None for one in made) <= 1


class Changes(LightningModule):
    """A module with such a hook."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


class ChangesData(LightningDataModule):
    """A data module with such a hook."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


def test_hooks_of_the_users_own_count() -> None:
    """Those of the module and of the data module; Lightning's own change nothing."""
    plain = SimpleNamespace(datamodule=LightningDataModule())
    assert not changes_batches(plain, LightningModule())
    assert not changes_batches(SimpleNamespace(datamodule=None), LightningModule())
    assert changes_batches(plain, Changes())
    assert changes_batches(SimpleNamespace(datamodule=ChangesData()), LightningModule())


class Holder:
    train_dataloader = "loader"
    datamodule: Any = None


@pytest.mark.parametrize("hook", ["on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"])
@pytest.mark.parametrize("kind", [LightningModule, LightningDataModule])
def test_hooks_that_change_a_batch(hook: str, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader is told where nothing of the user's changes its batches, in module and data module."""
    changed: Any = type("Changed", (kind,), {hook: lambda self, batch, *args: batch})()
    holder, module = Holder(), LightningModule()
    assert readable_loader(holder, module) == "loader"
    if kind is LightningDataModule:
        holder.datamodule = LightningDataModule()
        assert readable_loader(holder, module) == "loader"
        holder.datamodule = changed
    else:
        module = changed
    assert readable_loader(holder, module) is None

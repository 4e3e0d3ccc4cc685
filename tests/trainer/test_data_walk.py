"""Every sample of a source is read once, with its row or its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytorch_lightning.utilities import CombinedLoader
from torch.utils.data import DataLoader, Dataset, TensorDataset, WeightedRandomSampler

from lightning_nanguard.diagnosis.data_check import Collated, Unreadable
from lightning_nanguard.trainer.data_walk import DataWalk, sources
from tests.classifier import Numbers
from tests.scenarios.one_percent import Stream

DATA = TensorDataset(torch.arange(10.0)[:, None], torch.arange(10))


class Keyed(Dataset[Any]):
    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.tensor(float(ord(key)))


class Broken(Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, row: int) -> torch.Tensor:
        if row == 2:
            raise OSError("broken file")
        return torch.tensor(row)


def walked(source: Any) -> list[tuple[Any, int, int]]:
    return [(place.row, place.batch, place.index) for place, _ in DataWalk(source)]


ROWS: dict[str, tuple[Callable[[], Any], list[Any]]] = {
    "data set": (lambda: DATA, list(range(10))),
    "shuffled": (lambda: DataLoader(DATA, batch_size=4, shuffle=True, drop_last=True), list(range(10))),
    "workers": (lambda: DataLoader(DATA, batch_size=3, shuffle=True, num_workers=2), list(range(10))),
    "batch sampler": (lambda: DataLoader(DATA, batch_sampler=[[3, 1], [4, 1]]), [3, 1, 4]),
    "keys": (lambda: DataLoader(Keyed(), batch_sampler=[["a", "c"], ["b"]]), ["a", "c", "b"]),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows(name: str) -> None:
    """All rows of the data set where the sampler is torch's own, else those it draws, each once."""
    make, rows = ROWS[name]
    assert [row for row, _, _ in walked(make())] == rows
    assert len(DataWalk(make())) == len(rows)


def test_weighted_rows() -> None:
    """A sampler that draws rows twice has each read once."""
    sampler = WeightedRandomSampler([1.0] * 3 + [0.0] * 7, 10)
    assert {row for row, _, _ in walked(DataLoader(DATA, batch_size=5, sampler=sampler))} <= {0, 1, 2}
    assert len(walked(DataLoader(DATA, batch_size=5, sampler=sampler))) <= 3


def test_places() -> None:
    """Streams and batches have places; batches are taken apart where each tensor has one entry a sample."""
    places = [(None, batch, index) for batch, count in enumerate((4, 4, 2)) for index in range(count)]
    assert walked(DataLoader(Stream([DATA[row] for row in range(10)]), batch_size=4)) == places
    batches = list(DataLoader(DATA, batch_size=4))
    assert walked(batches) == places
    assert all(isinstance(sample, Collated) for _, sample in DataWalk(batches))
    assert walked([[torch.zeros(3), torch.tensor(1.0)]]) == [(None, 0, 0)]
    assert len(DataWalk(iter(batches))) == 0


def test_a_sample_that_cannot_be_read_hides_no_other() -> None:
    """Its error is told in its place."""
    read = [sample for _, sample in DataWalk(Broken())]
    assert [isinstance(one, Unreadable) for one in read] == [False, False, True, False]
    assert read[2].error == "OSError: broken file"


def test_sources() -> None:
    """The loaders of a data module by their names, also several; else the object itself."""
    module = Numbers()
    assert list(sources(module)) == ["train"]
    loaders = {"a": DataLoader(DATA), "b": [DataLoader(DATA)]}
    module.train_dataloader = lambda: CombinedLoader(loaders)  # type: ignore[method-assign]
    assert list(sources(module)) == ["train.a", "train.b.0"]
    module.train_dataloader = lambda: [DataLoader(DATA), DataLoader(DATA)]  # type: ignore[method-assign]
    assert list(sources(module)) == ["train.0", "train.1"]
    assert list(sources(DATA)) == ["data"]
    assert list(sources([DataLoader(DATA)])) == ["data.0"]
    with pytest.raises(TypeError, match="3 is not a data module, loader or data set"):
        sources(3)

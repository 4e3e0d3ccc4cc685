"""Reads the samples of loaders, data modules and data sets once, without a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler

from lightning_nanguard.diagnosis.batch import samples
from lightning_nanguard.diagnosis.data_check import Collated, Unreadable
from lightning_nanguard.measure.sample_parts import is_separable, select_samples
from lightning_nanguard.record.bad_samples import BadSample
from lightning_nanguard.state.batch_history import row_of

_WHOLE = (RandomSampler, SequentialSampler, DistributedSampler)
"""Samplers of all rows, some of which an epoch may leave out."""


def sources(made: Any) -> dict[str, Any]:
    """The sources to read, by name: the loaders of a data module, else the object itself.

    Args:
        made: A data module, a loader, a data set, or several of these.

    Raises:
        TypeError: If it is none of them.
    """
    if callable(getattr(made, "train_dataloader", None)):
        made.prepare_data()
        made.setup("fit")
        found = {"train": made.train_dataloader()}
        if type(made).val_dataloader.__module__.split(".")[0] not in ("pytorch_lightning", "lightning"):
            found["val"] = made.val_dataloader()
        return dict(_flat(found))
    if not (isinstance(made, (Dataset, Mapping)) or hasattr(made, "__iter__")):
        raise TypeError(f"{made!r} is not a data module, loader or data set.")
    held = made.values() if isinstance(made, Mapping) else made
    loaders = isinstance(made, (Mapping, list, tuple)) and all(isinstance(one, DataLoader) for one in held)
    return dict(_flat({"data": made})) if loaders else {"data": made}


def _flat(found: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, one in found.items():
        inner = getattr(one, "iterables", one)  # a CombinedLoader
        if isinstance(inner, Mapping):
            yield from _flat({f"{name}.{key}": value for key, value in inner.items()})
        elif isinstance(inner, (list, tuple)) and all(isinstance(value, DataLoader) for value in inner):
            yield from _flat({f"{name}.{key}": value for key, value in enumerate(inner)})
        else:
            yield name, inner


@final
class _Readable(Dataset[Any]):
    """A data set in which a sample that cannot be read is reported as such."""

    def __init__(self, data: Any) -> None:
        self._data = data

    def __getitem__(self, key: Any) -> Any:
        try:
            return key, self._data[key]
        except Exception as error:  # go on with the samples after a broken file
            return key, Unreadable(f"{type(error).__name__}: {error}")


def _as_list(items: list[Any]) -> list[Any]:
    return items


@final
class DataWalk:
    """Iterates over the samples of one source.

    Args:
        source: A loader, a data set, or an iterable of batches.
    """

    def __init__(self, source: Any) -> None:
        self._loader = source if isinstance(source, DataLoader) else None
        self._data: Any = source if self._loader is None else self._loader.dataset
        self._streams = isinstance(self._data, IterableDataset)
        self._rows = None if self._streams else self._keys()

    def __len__(self) -> int:
        """Number of samples, or of batches if only these can be counted; 0 if it is not known."""
        try:
            return len(self._rows) if self._rows is not None else len(self._data)
        except TypeError:
            return 0

    def _keys(self) -> Sequence[Any] | None:
        loader = self._loader
        if loader is None:
            mapped = isinstance(self._data, Dataset) and hasattr(self._data, "__len__")
            return range(len(self._data)) if mapped else None
        if loader.batch_size is None and loader.batch_sampler is None:
            return None  # the data set returns whole batches
        if type(loader.sampler) in _WHOLE and type(loader.batch_sampler).__module__.startswith("torch."):
            return range(len(self._data))
        batches: Any = loader.batch_sampler
        return list(dict.fromkeys(key for batch in batches for key in batch))

    def __iter__(self) -> Iterator[tuple[BadSample, Any]]:
        """Each sample with its place."""
        if self._rows is not None:
            for items in self._reader(_Readable(self._data), self._rows):
                yield from ((BadSample("", row_of(key)), sample) for key, sample in items)
        elif self._streams and (self._loader is None or self._loader.batch_size is not None):
            for number, items in enumerate(self._reader(self._data, None)):
                yield from ((BadSample("", batch=number, index=index), sample) for index, sample in enumerate(items))
        else:
            yield from self._of_batches()

    def _reader(self, data: Any, rows: Sequence[Any] | None) -> Any:
        loader = self._loader
        workers: dict[str, Any] = {}
        if loader is not None and loader.num_workers:
            workers = {"num_workers": loader.num_workers, "worker_init_fn": loader.worker_init_fn}
        size = (None if loader is None else loader.batch_size) or 1
        return DataLoader(data, batch_size=size, sampler=rows, collate_fn=_as_list, **workers)

    def _of_batches(self) -> Iterator[tuple[BadSample, Any]]:
        source: Any = self._data if self._loader is None else self._loader
        for number, batch in enumerate(source):
            count = samples(batch) or 0
            if not is_separable(batch, count):
                yield BadSample("", batch=number), batch
                continue
            for index in range(count):
                yield BadSample("", batch=number, index=index), Collated(select_samples(batch, [index]))

"""Finds the rows of the present batch, by watching the loader's sampler, and hooks that change whole batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, final

from torch.utils.data import DataLoader, default_collate
from torch.utils.data.dataloader import _DatasetKind

from lightning_nanguard.act.patches import undo_all, wrap_method
from lightning_nanguard.diagnosis.batch import samples
from lightning_nanguard.measure.sample_parts import found_again, is_separable, select_samples
from lightning_nanguard.record.bad_samples import KnownSamples
from lightning_nanguard.state.batch_history import BatchOrigin, without
from lightning_nanguard.types import Row


@final
class _Draws(Iterator[Any]):
    """Passes the keys that a sampler draws in one epoch on to the loader, and records them.

    Args:
        sampler: Draws the keys of a batch.
        leave_out: Rows that are left out of every batch.
        ahead: Number of batches that may be drawn ahead of the training.
    """

    def __init__(self, sampler: Any, leave_out: set[Row], ahead: int) -> None:
        self._inner = iter(sampler)  # now, as in the loader: iter() may draw random numbers
        self._leave_out = leave_out
        self._kept: deque[tuple[tuple[Any, ...], bool]] = deque(maxlen=ahead)
        self._count = 0

    def __next__(self) -> Any:
        keys = next(self._inner)
        nothing, rows = False, ()
        # A sampler may return any key of its data set, such as a tensor or a slice.
        if isinstance(keys, (list, tuple)):
            left = without(keys, self._leave_out) if self._leave_out else keys
            # A loader cannot return an empty batch. It returns the whole batch, which is skipped later.
            nothing = len(keys) > 0 and not left
            keys = keys if nothing or len(left) == len(keys) else left
            rows = tuple(keys)
        self._kept.append((rows, nothing))
        self._count += 1
        return keys

    def of(self, position: int) -> tuple[tuple[Any, ...], bool] | None:
        """Keys of the batch at a position, and whether all its rows are left out; ``None`` if it is not kept."""
        index = position - self._count
        return self._kept[index] if -len(self._kept) <= index < 0 else None


@final
class _WatchedSampler:
    """Wraps the sampler of a loader's iterator. The order of the keys does not change.

    Args:
        sampler: The sampler.
        leave_out: Rows that are left out of every training batch.
        ahead: Number of batches that may be drawn ahead of the training.
        trainer: The trainer. The same loader may be used for validation, so its state is checked.
    """

    def __init__(self, sampler: Any, leave_out: set[Row], ahead: int, trainer: Any) -> None:
        self.sampler = sampler
        self._leave_out = leave_out
        self._ahead = ahead
        self._trainer = trainer

    def __iter__(self) -> _Draws:
        return _Draws(self.sampler, self._leave_out if self._trainer.training else set(), self._ahead)

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)


@final
class _Watch:
    """Lets the iterators of one loader use a watched sampler. The loader itself keeps its own sampler.

    Args:
        loader: The loader.
        leave_out: Rows that are left out of every batch.
        waiting: How many batches Lightning may hold.
        trainer: The trainer.
    """

    def __init__(self, loader: DataLoader[Any], leave_out: set[Row], waiting: int, trainer: Any) -> None:
        self._loader = loader
        ahead = (loader.prefetch_factor or 0) * loader.num_workers + waiting
        self._sampler = _WatchedSampler(loader.batch_sampler, leave_out, ahead, trainer)
        # With persistent workers the iterator of an earlier fit is used again.
        there = loader._iterator
        if there is not None:
            there._index_sampler = self._sampler
        self._undo = wrap_method(loader, "_get_iterator", self._get_iterator)

    def _get_iterator(self, original: Callable[[], Any]) -> Any:
        # Set in the dictionary, because DataLoader.__setattr__ refuses to change its sampler.
        own = vars(self._loader)
        own["batch_sampler"] = self._sampler
        try:
            return original()
        finally:
            own["batch_sampler"] = self._sampler.sampler

    def undo(self) -> None:
        self._undo()
        there: Any = self._loader._iterator
        if there is not None and there._index_sampler is self._sampler:
            there._index_sampler = self._sampler.sampler


def _can_be_watched(loader: Any) -> bool:
    """Whether a loader's batches hold the rows that its sampler draws, in the same order."""
    if not isinstance(loader, DataLoader) or loader._dataset_kind != _DatasetKind.Map or loader.batch_sampler is None:
        return False
    kind = type(loader)
    own = kind.__iter__ is DataLoader.__iter__ and kind._get_iterator is DataLoader._get_iterator
    return own and (loader.num_workers == 0 or getattr(loader, "in_order", True))


@final
class DataOrder:
    """Knows the rows of the present batch. It changes neither the order of batches nor any random number.

    Args:
        trainer: The trainer.
        known: The bad samples so far. Rows that it leaves out are removed from every batch drawn from now on.
        waiting: Number of batches that Lightning may prefetch.
    """

    def __init__(self, trainer: Any, known: KnownSamples, waiting: int) -> None:
        self._trainer = trainer
        self.known = known
        self._waiting = waiting
        self._watches: dict[int, _Watch] = {}
        # Called after Lightning replaced the samplers and before the first iterator. There is no hook at this point.
        undos = [wrap_method(trainer.strategy, "process_dataloader", self._process)]
        if known.quarantine:
            undos.append(wrap_method(trainer.strategy, "batch_to_device", self._without_known))
        self._undo = undo_all(undos)
        # Whether every sample of the present batch has the hash of a bad one.
        self._nothing_left = False

    def _process(self, original: Callable[[Any], Any], loader: Any) -> Any:
        loader = original(loader)
        if self._trainer.training and _can_be_watched(loader):
            known = self._watches.pop(id(loader), None)
            if known is not None:
                known.undo()
            self._watches[id(loader)] = _Watch(loader, self.known.left_out, self._waiting, self._trainer)
        return loader

    def _without_known(self, original: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Leave out samples by their hashes, if the data have no rows for the sampler to leave out."""
        if self._trainer.training and self.known.hashes:
            self._nothing_left = False
            origin, count = self.origin(0), samples(batch) or 0
            if origin.keys is None and origin.collated and is_separable(batch, count):
                bad = set(found_again(batch, self.known.hashes))
                self._nothing_left = len(bad) == count
                if bad and not self._nothing_left:
                    batch = select_samples(batch, [index for index in range(count) if index not in bad])
        return original(batch, *args, **kwargs)

    def combines(self) -> bool:
        """Whether each batch combines samples of several loaders. The same ones hardly ever come together again."""
        return len(getattr(self._trainer.fit_loop._combined_loader, "flattened", ())) > 1

    def origin(self, batch_idx: int) -> BatchOrigin:
        """The origin of the present batch in the data.

        Args:
            batch_idx: Its index in the epoch, as Lightning counts.
        """
        loop, epoch = self._trainer.fit_loop, self._trainer.current_epoch
        if hasattr(loop._data_fetcher, "iterator_wrapper"):
            return BatchOrigin(batch_idx, epoch)  # training_step takes any number of batches itself
        try:
            combined, waiting = loop._combined_loader, len(getattr(loop._data_fetcher, "batches", ()))
            position = combined._iterator._idx - 1 - waiting
            if batch_idx == 0:
                self._forget_all_but(combined.flattened)
            [loader] = combined.flattened
            [iterator] = combined._iterator.iterators
        except (AttributeError, TypeError, ValueError):  # several loaders
            return BatchOrigin(batch_idx, epoch)
        collated = getattr(loader, "collate_fn", None) is default_collate
        drawn = getattr(iterator, "_sampler_iter", None)
        if id(loader) not in self._watches or not isinstance(drawn, _Draws):
            return BatchOrigin(position, epoch, collated=collated, nothing_left=self._nothing_left)
        found = drawn.of(iterator._num_yielded - 1 - waiting)
        keys, nothing = (None, False) if found is None else found
        return BatchOrigin(position, epoch, keys or None, collated, nothing)

    def _forget_all_but(self, loaders: Iterable[Any]) -> None:
        """Release loaders that were replaced, with their data and workers (``reload_dataloaders_every_n_epochs``)."""
        for other in self._watches.keys() - set(map(id, loaders)):
            self._watches.pop(other).undo()

    def dataset(self) -> Any:
        """The training data set if there is one loader with rows; else ``None``."""
        loaders: Any = getattr(self._trainer.fit_loop._combined_loader, "flattened", ())
        return loaders[0].dataset if len(loaders) == 1 and id(loaders[0]) in self._watches else None

    def close(self) -> None:
        """Remove everything from the loaders."""
        self._undo()
        for watch in self._watches.values():
            watch.undo()
        self._watches.clear()


_AROUND = ("on_before_batch_transfer", "on_after_batch_transfer")


def changes_batches(trainer: Any, module: Any) -> bool:
    """Whether the module or the data module overrides a hook before or after the transfer of a batch."""
    return _overrides(trainer, module, *_AROUND)


def readable_loader(trainer: Any, module: Any) -> Any:
    """The training dataloader; ``None`` if hooks of the user change its batches before the module sees them."""
    return None if _overrides(trainer, module, *_AROUND, "transfer_batch_to_device") else trainer.train_dataloader


def _overrides(trainer: Any, module: Any, *names: str) -> bool:
    # Lightning's is_overridden does not know the classes of its other package.
    owners = (module, getattr(trainer, "datamodule", None))
    hooks = [getattr(owner, name, None) for owner in owners if owner is not None for name in names]
    homes = [str(getattr(hook, "__module__", "")) for hook in hooks if hook is not None]
    return not all(home.startswith(("pytorch_lightning.", "lightning.")) for home in homes)

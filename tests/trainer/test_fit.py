"""One guarded fit: what is put on the trainer for it, and taken off again."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint
from torch.optim import SGD
from torch.utils.data import DataLoader

from lightning_nanguard import Intervention, NaNGuard, Sink
from lightning_nanguard.guard.guard import Guard
from lightning_nanguard.trainer.fit import Fit
from tests.helpers import Task, batches, fit, mlp, task, trainer_for, with_bad, with_nan
from tests.trainer.fits import captured


def put_on(trainer: Trainer) -> dict[str, Any]:
    """Whatever hides a method of the trainer, its strategy or its callbacks, and whatever is attached to them."""
    owners = [trainer, trainer.strategy, trainer.strategy.checkpoint_io, trainer._checkpoint_connector]
    owners += [one for one in trainer.callbacks if not isinstance(one, NaNGuard)]
    hidden = {
        f"{type(owner).__name__}.{name}": value
        for owner in owners
        for name, value in vars(owner).items()
        if callable(getattr(type(owner), name, None))
    }
    hooks = [one._optimizer_step_pre_hooks or one._optimizer_step_post_hooks for one in trainer.optimizers]
    return {**hidden, "hooks": any(hooks), "callbacks": {type(one).__name__ for one in trainer.callbacks}}


class Amid(Callback):
    """Notes what is put on the trainer in the middle of a fit, and ends it with an error on request."""

    def __init__(self, fails: bool) -> None:
        self.fails = fails
        self.seen: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.seen = put_on(trainer)
        if self.fails:
            raise KeyError("of the user's own")


@pytest.mark.parametrize("fails", [False, True], ids=["ends", "fails"])
def test_everything_is_taken_off_again(fails: bool, tmp_path: Path) -> None:
    """However a fit ends, trainer, strategy, callbacks and optimizers are as before, and what the user had put on the
    trainer is there again."""

    def own(*args: Any, **kwargs: Any) -> Any:
        return Trainer.save_checkpoint(trainer, *args, **kwargs)

    amid, guard = Amid(fails), NaNGuard(last_good_every_n_steps=1)
    parts = [LearningRateMonitor(), ModelCheckpoint(tmp_path, monitor="loss"), amid]
    trainer = trainer_for(tmp_path, guard, parts, enable_checkpointing=True, limit_val_batches=0)
    trainer.save_checkpoint = own
    before, loader = put_on(trainer), DataLoader(batches(count=2), batch_size=None)
    with pytest.raises(KeyError, match="of the user's own") if fails else nullcontext():
        trainer.fit(task(), loader, loader)
    assert amid.seen["Trainer.save_checkpoint"] is not own
    assert amid.seen["hooks"]
    assert "ModelCheckpoint.check_monitor_top_k" in amid.seen
    assert amid.seen["callbacks"] > before["callbacks"]
    assert put_on(trainer) == before
    assert trainer.save_checkpoint is own
    assert guard._fit is None


def test_everything_is_taken_off_though_a_sink_cannot_close(tmp_path: Path) -> None:
    """Nor does it matter to the user's run."""

    class Breaks(Sink):
        def write(self, intervention: Intervention) -> None: ...

        def close(self) -> None:
            raise OSError("disk full")

    trainer = trainer_for(tmp_path, NaNGuard(sinks=[Breaks()]), limit_val_batches=0)
    before, loader = put_on(trainer), DataLoader(batches(count=2), batch_size=None)
    trainer.fit(task(), loader, loader)
    assert put_on(trainer) == before


def test_everything_is_taken_off_though_one_part_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An error while the guard lets go leaves none of its methods on the trainer, and does not end the run."""

    def fails(guard: Guard) -> None:
        raise RuntimeError("cannot let go")

    monkeypatch.setattr(Guard, "close", fails)
    trainer = trainer_for(tmp_path, NaNGuard(last_good_every_n_steps=1), limit_val_batches=0)
    before, loader = put_on(trainer), DataLoader(batches(count=2), batch_size=None)
    trainer.fit(task(), loader, loader)
    assert "NaNGuard failed while the run was ending: cannot let go" in caplog.text
    assert {**put_on(trainer), "hooks": False} == before


# Bytes of the parameters; with Adam's two moments a snapshot takes three times as many.
SIZE = 4 * sum(parameter.numel() for parameter in mlp().parameters())


@pytest.mark.parametrize(
    ("snapshots", "most", "kept"), [(2.1, 3, 1), (3.1, 3, 2), (4.1, 3, 3), (100.0, 3, 3), (3.1, 1, 1)]
)
def test_as_many_snapshots_are_kept_as_fit(snapshots: float, most: int, kept: int, tmp_path: Path) -> None:
    """One place is for the pending one; never more than the user asks for."""
    guard = NaNGuard(max_snapshots=most, max_snapshot_memory=snapshots * 3 * SIZE / 2**30)
    seen, _ = captured(guard, folder=tmp_path)
    assert seen.fit.context.ring.capacity == kept


def test_too_little_memory_says_how_much_is_needed(tmp_path: Path) -> None:
    """Where not even one certified and one pending snapshot fit, at the start of the fit."""
    needed = f"{2 * 3 * SIZE / 2**30:.3g} GiB"
    with pytest.raises(ValueError, match=rf"one snapshot takes about .* GiB and two are needed.*Allow {needed}"):
        captured(NaNGuard(max_snapshot_memory=1.9 * 3 * SIZE / 2**30), folder=tmp_path)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Fit:
    """The parts of a fit of four updates, one of them bad."""
    return captured(NaNGuard(), data=with_bad(2, count=4), folder=tmp_path_factory.mktemp("fit"))[0].fit


class Wrapper:
    """As Lightning and DeepSpeed wrap an optimizer."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer


def test_an_optimizer_is_known_by_its_index(ended: Fit, caplog: pytest.LogCaptureFixture) -> None:
    """Itself or wrapped; one that was not there when the fit began is not guarded, which is said once."""
    (known,) = ended.context.learner.optimizers
    assert ended.optimizer_index(known) == ended.optimizer_index(Wrapper(known)) == 0
    assert caplog.text == ""
    late = SGD(mlp().parameters(), lr=0.1)
    assert [ended.optimizer_index(late) for _ in range(3)] == [None] * 3
    assert caplog.text.count("the optimizer SGD that is about to step was not there when the fit began") == 1


def test_the_share_of_bad_updates_is_counted(ended: Fit) -> None:
    """Of all updates of the fit."""
    assert ended.non_finite_rate() == 0.25


class ZerosEverySecond(Task):
    """Accumulates gradients by hand: they are zeroed before every second batch."""

    def __init__(self) -> None:
        super().__init__(mlp())

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        if batch_idx % 2 == 0:
            optimizer.zero_grad()


def test_bad_gradients_are_not_added_to_later_ones(tmp_path: Path) -> None:
    """A module that zeroes gradients itself loses one batch, whether it is the first or the second of its pair."""
    for bad in (6, 7):
        guard = NaNGuard()
        fit(ZerosEverySecond(), with_bad(bad), guard, folder=tmp_path / str(bad))
        assert [(one.batch_idx, one.remedies) for one in guard.interventions] == [(bad, ("skip",))]


@pytest.mark.parametrize("monitor", ["loss_step", "loss_epoch"])
def test_names_of_logged_values_stay(monitor: str, tmp_path: Path) -> None:
    """If the first batches are skipped, what they logged is NaN for those who read it, and the mean is that of the
    others."""
    seen: list[float] = []

    class Reads(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if monitor == "loss_step":
                seen.append(float(trainer.callback_metrics["loss_step"]))

        def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
            seen.append(float(trainer.callback_metrics[monitor]))

    bad = range(8) if monitor == "loss_epoch" else range(1)
    data = [with_nan(batch) if index in bad else batch for index, batch in enumerate(batches(count=8))]
    fit(task(), data, NaNGuard(), folder=tmp_path, callbacks=[Reads()])
    assert math.isnan(seen[0])
    assert all(map(math.isfinite, seen[1:]))

"""The last good checkpoint on disk."""

from __future__ import annotations

import logging
import math
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning.callbacks as stock
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.plugins.io import AsyncCheckpointIO
from torch.utils.data import DataLoader

from lightning_nanguard import BadCheckpointError, Budget, NaNGuard, TrainingDivergedError
from lightning_nanguard.checkpoints.inspection import inspect
from lightning_nanguard.cli.main import main
from lightning_nanguard.record.files import LAST_GOOD
from tests.checkpoints.training import EPOCHS, PER_EPOCH, Net, cut, guard_with, train
from tests.helpers import batches, copied, differences, learner_of, non_finite, words
from tests.modules import Diverge, NaNWeight

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.usefixtures("own_folder"),
]


def keeping(folder: Path, every: int = 5, **options: Any) -> NaNGuard:
    return guard_with(dirpath=folder, last_good_every_n_steps=every, **options)


class Look(Callback):
    """Notes the step of the last good file after every batch, and what the learner was."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / LAST_GOOD
        self.steps: list[int | None] = []
        self.learners: dict[int, Any] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.learners[trainer.global_step] = copied(learner_of(trainer, pl_module))
        known = torch.load(self.file, weights_only=True)["global_step"] if self.file.exists() else None
        self.steps.append(known)


# ---------------------------------------------------------------------------------------------------- what is kept


def test_a_certified_state_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The file appears once its state is certified, two healthy updates later, holds that state bit by bit, and gives
    way to a newer one only when that is certified too; the trainer has nothing to say about it.
    """
    look = Look(tmp_path)
    with caplog.at_level(logging.INFO):
        trainer, _, _, _ = train(keeping(tmp_path), look)
    assert "weights_only" not in caplog.text
    appeared = {step: look.steps.index(step) + 1 for step in look.steps if step is not None}
    assert len(appeared) >= 5
    assert all(at - step in (2, 3) for step, at in appeared.items()), appeared
    content = torch.load(look.file, weights_only=True)
    kept = look.learners[content["global_step"]]
    assert differences(dict(content["state_dict"]), {**kept["parameters"], **kept["buffers"]}) == []
    assert differences(content["optimizer_states"], kept["optimizers"]) == []
    assert [file.name for file in tmp_path.glob("*.ckpt*")] == [LAST_GOOD]
    assert type(trainer.callbacks[-1]).__name__ != "_LastCallback"


def test_a_run_goes_on_from_it(tmp_path: Path) -> None:
    """A run that goes on from it ends with the bits of one that was not stopped, after a cut and clipping too."""
    trainer, module, rates, _ = train(keeping(tmp_path, every=17), Diverge(7, 10))
    step = torch.load(tmp_path / LAST_GOOD, weights_only=True)["global_step"]
    assert 12 < step < PER_EPOCH * EPOCHS
    trainer2, module2, rates2, _ = train(guard_with(), Diverge(7, 10), resume=tmp_path / LAST_GOOD)
    assert len(rates2) == PER_EPOCH * EPOCHS - step
    assert rates2 == rates[-len(rates2) :]
    assert differences(learner_of(trainer, module), learner_of(trainer2, module2)) == []


def test_nothing_changes_for_a_healthy_run(tmp_path: Path) -> None:
    """A run has the same bits with the file kept and without."""
    ends = []
    for guard in (None, keeping(tmp_path, every=2)):
        trainer, module, _, logger = train(guard)
        rows = [row for row in logger.rows if not any(name.startswith("nanguard/") for name in row[1])]
        ends.append((copied(learner_of(trainer, module)), rows))
    assert differences(ends[0], ends[1]) == []


def test_a_state_under_suspicion_is_not_kept(tmp_path: Path) -> None:
    """A file whose state is rolled back before it was certified never takes the place of the older one."""
    look = Look(tmp_path)
    guard = keeping(tmp_path, every=5)
    train(guard, NaNWeight([11]), look)
    assert ("restore",) in words(guard)
    assert non_finite(torch.load(look.file, weights_only=True)["state_dict"]) == []
    known = [step for step in look.steps if step is not None]
    assert known == sorted(known)
    assert not (tmp_path / f"{LAST_GOOD}.pending").exists()


@pytest.mark.parametrize("readback", ["step", "deferred"])
def test_async_and_deferred(readback: str, tmp_path: Path) -> None:
    """A plugin that writes in the background leaves a whole file, whose newest state is certified."""
    guard = keeping(tmp_path, readback=readback)
    train(guard, plugins=[AsyncCheckpointIO()])
    found = inspect(tmp_path / LAST_GOOD)
    assert found.good()
    assert found.global_step is not None
    assert found.global_step >= 30


@pytest.mark.skipif(not hasattr(stock, "EMAWeightAveraging"), reason="this Lightning has no WeightAveraging")
def test_averages_are_those_of_the_same_update(tmp_path: Path) -> None:
    """An average, which follows the weights behind the guard, is in the file as of the same update."""
    average = stock.EMAWeightAveraging(decay=0.9)
    seen: dict[int, Any] = {}

    class After(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            seen[trainer.global_step] = copied(dict(average._average_model.module.named_parameters()))

    train(keeping(tmp_path), average, After())
    content = torch.load(tmp_path / LAST_GOOD, weights_only=True)
    assert differences(dict(content["state_dict"]), seen[content["global_step"]]) == []


def test_accumulation(tmp_path: Path) -> None:
    """With accumulation the file is written at an update, not between two micro-batches."""
    train(keeping(tmp_path, every=2), accumulate_grad_batches=3)
    content = torch.load(tmp_path / LAST_GOOD, weights_only=True)
    done = content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]
    assert done % 3 == 0


def test_observing_keeps_it_too(tmp_path: Path) -> None:
    """With observe=True the file is kept all the same, of certified states only."""
    train(keeping(tmp_path, observe=True))
    assert inspect(tmp_path / LAST_GOOD).good()


def test_the_error_says_where_it_lies(tmp_path: Path) -> None:
    """A run that cannot be helped names the file that another may go on from."""
    guard = keeping(tmp_path, budget=Budget(max_rollbacks=2))
    with pytest.raises(TrainingDivergedError, match=r"checkpoint: the last good one is .*nanguard-last-good\.ckpt"):
        train(guard, NaNWeight([15, 18, 21]))
    assert inspect(tmp_path / LAST_GOOD).good()


def test_the_other_package(tmp_path: Path) -> None:
    """With lightning.pytorch the file is kept, gone on from, and refused like with pytorch_lightning."""
    lightning = pytest.importorskip("lightning.pytorch")

    class Whole(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (self.net(batch[0]) - batch[1]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    class Saved(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 10:
                trainer.save_checkpoint(tmp_path / "plain.ckpt")

    def fit(ckpt_path: Path | None, epochs: int, callback: Any) -> int:
        trainer = lightning.Trainer(
            accelerator="cpu", max_epochs=epochs, callbacks=[callback], logger=False,
            enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
        )  # fmt: skip
        trainer.fit(Whole(), DataLoader(batches(count=12), batch_size=None), ckpt_path=ckpt_path)
        return int(trainer.global_step)

    assert fit(None, 1, keeping(tmp_path)) == fit(None, 1, Saved()) == 12
    # Lightning 2.4 repeats a batch after any checkpoint within an epoch.
    assert fit(tmp_path / LAST_GOOD, 2, keeping(tmp_path)) == fit(tmp_path / "plain.ckpt", 2, Saved())
    poisoned = torch.load(tmp_path / LAST_GOOD, weights_only=True)
    poisoned["state_dict"]["net.one.bias"][0] = math.nan
    torch.save(poisoned, tmp_path / "bad.ckpt")
    with pytest.raises(BadCheckpointError, match=r"net\.one\.bias is not finite"):
        fit(tmp_path / "bad.ckpt", 3, keeping(tmp_path))


# ------------------------------------------------------------------------------------------------- a disk that fails


@pytest.fixture
def small_files() -> Iterator[Callable[[], None]]:
    """Makes every write of more than 4 KiB fail from now on, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("background", [False, True], ids=["plain", "async"])
def test_full_disk(
    background: bool, tmp_path: Path, small_files: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    """When the disk fills up in mid-run the older file stays as it is, it is said once, and training goes on."""
    look = Look(tmp_path)

    class Fill(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 20:
                small_files()

    options = {"plugins": [AsyncCheckpointIO()]} if background else {}
    trainer, *_ = train(keeping(tmp_path), look, Fill(), **options)
    assert trainer.global_step == PER_EPOCH * EPOCHS
    found = inspect(look.file)
    assert found.good()
    assert 10 <= (found.global_step or 0) <= 20
    assert caplog.text.count("cannot write") == 1
    assert [file.name for file in tmp_path.glob("*.ckpt*")] == [LAST_GOOD]


def test_folder_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder that cannot be made is said once; training goes on, and so do interventions."""
    (tmp_path / "taken").write_text("a file where the folder should be")
    guard = keeping(tmp_path / "taken" / "deeper")
    trainer, *_ = train(guard, NaNWeight(20))
    assert trainer.global_step == PER_EPOCH * EPOCHS
    assert words(guard) == [("restore",)]
    assert caplog.text.count(f"cannot write {tmp_path / 'taken' / 'deeper' / LAST_GOOD}") == 1


# -------------------------------------------------------------------------------------------------------- the command


def test_the_command_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`nanguard last-good` prints the newest good file's path and nothing else, for `ckpt_path`."""
    for name in ("one", "two"):
        train(keeping(tmp_path / "runs" / name / "nanguard"))
    newest = tmp_path / "runs" / "two" / "nanguard" / LAST_GOOD
    capsys.readouterr()
    assert main(["last-good", str(tmp_path / "runs")]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{newest}\n"
    assert "whole and finite" in shown.err
    cut(newest)
    assert main(["last-good", str(tmp_path / "runs")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'runs' / 'one' / 'nanguard' / LAST_GOOD}\n"


def test_a_folder_of_shards_is_not_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The index of one is a pickle: the command says so and goes on to other files."""
    (tmp_path / "run" / LAST_GOOD).mkdir(parents=True)
    assert main(["last-good", str(tmp_path)]) == 2
    assert "folder of shards, and its index is a pickle" in capsys.readouterr().err


def test_the_command_finds_none(saved: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A good checkpoint that is in no run's log is printed and said to be so; without any it says how to have one."""
    good = saved(16, folder=tmp_path / "run" / "checkpoints")
    assert main(["last-good", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{good}\n"
    assert "in no run's log" in shown.err
    good.unlink()
    assert main(["last-good", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "last_good_every_n_steps" in shown.err


@pytest.mark.parametrize(
    ("argument", "value"),
    [("last_good_every_n_steps", 0), ("last_good_every_n_steps", True), ("resume", "newest"), ("resume", None)],
)
def test_arguments_are_checked(argument: str, value: Any) -> None:
    """A value out of range is refused by name."""
    with pytest.raises(ValueError, match=rf"{argument}={value!r}"):
        NaNGuard(**{argument: value})

"""The last good checkpoint on disk, and what a run may go on from."""

from __future__ import annotations

import math
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning.callbacks as stock
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.io import AsyncCheckpointIO
from torch.utils.data import DataLoader

from lightning_nanguard import BadCheckpointError, Budget, NaNGuard, TrainingDivergedError
from lightning_nanguard.checkpoints.inspection import LAST_GOOD, damage, inspect
from lightning_nanguard.cli.main import main
from tests.helpers import Positioned, batches, copied, differences, learner_of, non_finite, task, trainer_for, words
from tests.modules import Diverge, NaNWeight, SaveAt
from tests.test_saves import Net
from tests.test_state import EPOCHS, PER_EPOCH, cosine_task, guard_with, train

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


def test_a_certified_state_is_kept(tmp_path: Path) -> None:
    """The file appears once its state is certified, two healthy updates later, holds that state bit by bit, and gives
    way to a newer one only when that is certified too.
    """
    look = Look(tmp_path)
    trainer, _, _, _ = train(keeping(tmp_path), look)
    appeared = {step: look.steps.index(step) + 1 for step in look.steps if step is not None}
    assert len(appeared) >= 5
    assert all(at - step in (2, 3) for step, at in appeared.items()), appeared
    content = torch.load(look.file, weights_only=True)
    kept = look.learners[content["global_step"]]
    assert differences(dict(content["state_dict"]), {**kept["parameters"], **kept["buffers"]}) == []
    assert differences(content["optimizer_states"], kept["optimizers"]) == []
    assert [file.name for file in tmp_path.iterdir()] == [LAST_GOOD]
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
        ends.append((copied(learner_of(trainer, module)), logger.rows))
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
    with pytest.raises(TrainingDivergedError, match=r"A certified checkpoint lies in .*nanguard-last-good\.ckpt"):
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

    def fit(ckpt_path: Path | None, epochs: int) -> int:
        trainer = lightning.Trainer(
            accelerator="cpu", max_epochs=epochs, callbacks=[keeping(tmp_path)], logger=False,
            enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
        )  # fmt: skip
        trainer.fit(Whole(), DataLoader(batches(count=12), batch_size=None), ckpt_path=ckpt_path)
        return int(trainer.global_step)

    assert fit(None, 1) == 12
    assert fit(tmp_path / LAST_GOOD, 2) == 24
    poisoned = torch.load(tmp_path / LAST_GOOD, weights_only=True)
    poisoned["state_dict"]["net.one.bias"][0] = math.nan
    torch.save(poisoned, tmp_path / "bad.ckpt")
    with pytest.raises(BadCheckpointError, match=r"net\.one\.bias is not finite"):
        fit(tmp_path / "bad.ckpt", 3)


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
    assert [file.name for file in tmp_path.iterdir()] == [LAST_GOOD]


def test_folder_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder that cannot be made is said once; training goes on, and so do interventions."""
    (tmp_path / "taken").write_text("a file where the folder should be")
    guard = keeping(tmp_path / "taken" / "deeper")
    trainer, *_ = train(guard, NaNWeight(20))
    assert trainer.global_step == PER_EPOCH * EPOCHS
    assert words(guard) == [("restore",)]
    assert caplog.text.count(f"cannot write {tmp_path / 'taken' / 'deeper' / LAST_GOOD}") == 1


# ---------------------------------------------------------------------------------------------------- bad checkpoints


def made(folder: Path, name: str = "checkpoints/step=16.ckpt", step: int = 16) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    train(guard_with(), SaveAt(step, path, stop=True))
    return path


def poison(path: Path, part: str = "weight") -> None:
    content = torch.load(path, weights_only=True)
    if part == "weight":
        content["state_dict"]["net.0.weight"][0, 0] = math.nan
    else:
        content["optimizer_states"][0]["state"][2]["exp_avg_sq"][0, 0] = math.inf
    torch.save(content, path)


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])


def hole(path: Path) -> None:
    data = bytearray(path.read_bytes())
    middle = data.index(b"data/0") + 200
    data[middle : middle + 16] = b"\0" * 16
    path.write_bytes(data)


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weight": (poison, r"state_dict: net\.0\.weight is not finite"),
    "moment": (lambda path: poison(path, "moment"), r"exp_avg_sq of parameter 2 is not finite"),
    "cut short": (cut, "it is cut short, or no checkpoint"),
    "empty": (lambda path: path.write_bytes(b""), "it is cut short, or no checkpoint"),
    "hole": (hole, "does not match its checksum"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_checkpoint_is_refused(kind: str, tmp_path: Path) -> None:
    """A poisoned or torn checkpoint is refused with what is wrong, and the newest good one beside it is offered."""
    spoil, message = BAD[kind]
    old, good, bad = (made(tmp_path, f"checkpoints/{n}.ckpt", n) for n in (5, 9, 16))
    spoil(bad)
    guard = guard_with()
    with pytest.raises(BadCheckpointError, match=message) as refused:
        train(guard, resume=bad)
    assert refused.value.path == bad
    assert refused.value.offered == good
    assert str(good) in str(refused.value)
    assert "of step 9" in str(refused.value)
    assert old.exists()
    # What is offered can be taken with the same guard.
    trainer, *_ = train(guard, resume=refused.value.offered)
    assert trainer.global_step == PER_EPOCH * EPOCHS


@pytest.mark.parametrize("kind", BAD)
def test_resume_last_good(kind: str, tmp_path: Path) -> None:
    """With resume="last-good" the run goes on from the newest good one instead, and that is on record."""
    spoil, _ = BAD[kind]
    good, bad = (made(tmp_path, f"checkpoints/{n}.ckpt", n) for n in (9, 16))
    spoil(bad)
    guard = guard_with(resume="last-good", dirpath=tmp_path)
    trainer, module, rates, _ = train(guard, resume=bad)
    whole_trainer, whole, whole_rates, _ = train(guard_with())
    assert trainer.ckpt_path == str(good)
    assert rates == whole_rates[9:]
    assert differences(learner_of(trainer, module), learner_of(whole_trainer, whole)) == []
    (record,) = guard.interventions
    assert (record.fault, record.remedies) == ("bad_checkpoint", ("resume",))
    assert str(bad) in record.message
    assert str(good) in record.message


def test_the_guards_own_file_is_found(tmp_path: Path) -> None:
    """The last good checkpoint in the folder of records beside the checkpoints is offered as well."""
    bad = made(tmp_path, "checkpoints/step=16.ckpt")
    cut(bad)
    train(keeping(tmp_path / "nanguard"))
    with pytest.raises(BadCheckpointError, match="cut short") as refused:
        train(guard_with(), resume=bad)
    assert refused.value.offered == tmp_path / "nanguard" / LAST_GOOD


def test_nothing_good_to_offer(tmp_path: Path) -> None:
    """Where every file is bad, or holds weights alone, that is said, with resume="last-good" too."""
    bad = made(tmp_path)
    content = torch.load(bad, weights_only=True)
    torch.save({"state_dict": content["state_dict"], "global_step": 3}, bad.with_name("weights.ckpt"))
    cut(bad)
    for resume in ("strict", "last-good"):
        with pytest.raises(BadCheckpointError, match="No other checkpoint near it is good"):
            train(guard_with(resume=resume), resume=bad)


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    """A missing file is Lightning's error, unless resume="last-good" finds a good one where it was looked for."""
    good = made(tmp_path, "checkpoints/9.ckpt", 9)
    missing = good.with_name("last.ckpt")
    with pytest.raises(FileNotFoundError, match="not found"):
        train(guard_with(), resume=missing)
    guard = guard_with(resume="last-good", dirpath=tmp_path)
    trainer, *_ = train(guard, resume=missing)
    assert trainer.ckpt_path == str(good)
    with pytest.raises(FileNotFoundError, match="not found"):
        train(guard_with(resume="last-good"), resume=tmp_path / "elsewhere" / "last.ckpt")


def test_masks_are_no_poison(tmp_path: Path) -> None:
    """A causal mask of −inf, infinite scores of callbacks and NaN metrics are no reason to refuse a checkpoint."""
    top = ModelCheckpoint(tmp_path, monitor="val_loss", save_last=True)
    data = DataLoader(batches(count=3), batch_size=None)
    for ckpt_path in (None, tmp_path / "last.ckpt"):
        module = task()
        module.net = Net()
        epochs = 1 if ckpt_path is None else 2
        trainer = trainer_for(tmp_path, NaNGuard(), [top], max_epochs=epochs, enable_checkpointing=True)
        trainer.fit(module, data, data, ckpt_path=ckpt_path)
    assert trainer.current_epoch == 2


def test_observing_refuses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With observe=True a checkpoint of bad moments is gone on from as without the guard, with a warning."""
    bad = made(tmp_path)
    poison(bad, "moment")
    train(guard_with(observe=True), resume=bad, epochs=2)
    assert "exp_avg_sq of parameter 2 is not finite" in caplog.text


def test_an_error_of_the_users_stays_theirs(tmp_path: Path) -> None:
    """A whole file that cannot be loaded for another reason gives the error it gives without the guard."""
    path = made(tmp_path)
    content = torch.load(path, weights_only=True)
    torch.save({**content, "state_dict": {"other": torch.zeros(1)}}, path)
    with pytest.raises(RuntimeError, match="Missing key"):
        train(guard_with(), resume=path)
    torch.save({**content, "extra": BadCheckpointError}, path)
    with pytest.raises(Exception, match="Weights only load failed"):
        train(guard_with(), resume=path)


def test_unknown_version_of_the_state(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The guard's state of a version this one cannot read is left out with a warning, and the run goes on."""
    path = made(tmp_path)
    content = torch.load(path, weights_only=True)
    (key,) = (key for key in content["callbacks"] if "NaNGuard" in key)
    assert content["callbacks"][key]["schema"] == 1
    content["callbacks"][key] = {"schema": 99, "guard": {"something": "new"}}
    torch.save(content, path)
    trainer, *_ = train(guard_with(), resume=path)
    assert trainer.global_step == PER_EPOCH * EPOCHS
    assert "version 99" in caplog.text
    assert "start anew" in caplog.text


def test_the_guards_hooks_are_gone_after_a_refusal(tmp_path: Path) -> None:
    """A trainer whose checkpoint was refused has nothing of the guard's left on it."""
    bad = made(tmp_path)
    cut(bad)
    trainer = trainer_for(None, guard_with())
    data, val = Positioned(batches(count=PER_EPOCH)), DataLoader(batches(count=1), batch_size=None)
    with pytest.raises(BadCheckpointError, match="cut short"):
        trainer.fit(cosine_task(), data, val, ckpt_path=bad)
    assert "resume_start" not in vars(trainer._checkpoint_connector)


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
    assert "folder of shards, whose index is a pickle" in capsys.readouterr().err


def test_the_command_finds_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without one it says how to have one, and names the newest good checkpoint there is."""
    good = made(tmp_path / "run")
    capsys.readouterr()
    assert main(["last-good", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "last_good_every_n_steps" in shown.err
    assert str(good) in shown.err


# ----------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("argument", "value"),
    [("last_good_every_n_steps", 0), ("last_good_every_n_steps", True), ("resume", "newest"), ("resume", None)],
)
def test_arguments_are_checked(argument: str, value: Any) -> None:
    """A value out of range is refused by name."""
    with pytest.raises(ValueError, match=rf"{argument}={value!r}"):
        NaNGuard(**{argument: value})


def test_a_folder_is_not_called_damaged(tmp_path: Path) -> None:
    """A sharded checkpoint is a folder, of which nothing can be told here; it is not called damaged."""
    assert damage(tmp_path) == ""

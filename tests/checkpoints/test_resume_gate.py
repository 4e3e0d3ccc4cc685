"""What a run may be resumed from."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_nanguard import BadCheckpointError, NaNGuard
from lightning_nanguard.checkpoints.resume_gate import ResumeGate
from lightning_nanguard.record.files import LAST_GOOD
from lightning_nanguard.thresholds.checkpoints import CheckpointsThresholds
from tests.checkpoints.training import BAD, PER_EPOCH, Net, cosine_task, cut, guard_with, poison, train
from tests.helpers import Positioned, batches, differences, learner_of, task, trainer_for

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.usefixtures("own_folder"),
]


@pytest.mark.parametrize("kind", BAD)
def test_bad_checkpoint(kind: str, saved: Callable[..., Path]) -> None:
    """A poisoned or torn checkpoint is refused with what is wrong, and the newest good one beside it is offered, or
    taken on request."""
    spoil, message = BAD[kind]
    bad = saved(5, 9, 16)
    spoil(bad)
    good = bad.with_name("9.ckpt")
    try:
        content, error = torch.load(bad, weights_only=True), None
    except Exception as raised:
        content, error = None, raised
    with pytest.raises(BadCheckpointError, match=message) as refused:
        ResumeGate(cosine_task(), [], take=False, observe=False)(bad, content, error)
    assert refused.value.path == bad
    assert refused.value.offered == good
    assert str(good) in str(refused.value)
    assert "(step 9)" in str(refused.value)
    gate = ResumeGate(cosine_task(), [], take=True, observe=False)
    assert gate(bad, content, error) == good
    assert gate.taken is not None
    assert (gate.taken.path, gate.taken.global_step) == (good, 9)
    assert str(bad) in str(gate.refused)
    observing = ResumeGate(cosine_task(), [], take=True, observe=True)
    assert observing(bad, content, error) is None
    assert observing.taken is None


def test_an_error_names_some_tensors(saved: Callable[..., Path]) -> None:
    """Of many bad tensors the first ones are named, and how many more there are."""
    bad = saved(16)
    content = torch.load(bad, weights_only=True)
    for tensor in content["state_dict"].values():
        tensor.fill_(math.nan)
    thresholds = CheckpointsThresholds(tensors_named=3)
    with pytest.raises(
        BadCheckpointError, match=r"net\.0\.weight, .*net\.0\.bias, .*net\.2\.weight and 1 more are not"
    ):
        ResumeGate(cosine_task(), [], take=False, observe=False, thresholds=thresholds)(bad, content, None)


@pytest.mark.parametrize("kind", ["moment", "cut short"])
def test_a_fit_is_refused(kind: str, saved: Callable[..., Path]) -> None:
    """A fit ends where its checkpoint is bad, in what could be loaded and in what could not; what the error offers can
    be taken with the same guard."""
    spoil, message = BAD[kind]
    bad = saved(5, 9, 16)
    spoil(bad)
    guard = guard_with()
    with pytest.raises(BadCheckpointError, match=message) as refused:
        train(guard, resume=bad)
    assert refused.value.offered == bad.with_name("9.ckpt")
    trainer, *_ = train(guard, resume=refused.value.offered, epochs=1)
    assert trainer.global_step == PER_EPOCH


@pytest.mark.parametrize("kind", ["weight", "hole"])
def test_resume_last_good(kind: str, saved: Callable[..., Path], tmp_path: Path) -> None:
    """With resume="last-good" the run goes on from the newest good one instead, and that is on record."""
    spoil, _ = BAD[kind]
    bad = saved(9, 16)
    good = bad.with_name("9.ckpt")
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


def test_the_guards_own_file_is_found(saved: Callable[..., Path], tmp_path: Path) -> None:
    """The last good checkpoint in the folder of records beside the checkpoints is offered as well."""
    bad = saved(16)
    cut(bad)
    saved(9, folder=tmp_path / "nanguard").rename(tmp_path / "nanguard" / LAST_GOOD)
    with pytest.raises(BadCheckpointError, match="cut short") as refused:
        train(guard_with(), resume=bad)
    assert refused.value.offered == tmp_path / "nanguard" / LAST_GOOD


def test_nothing_good_to_offer(saved: Callable[..., Path]) -> None:
    """Where every file is bad, or holds weights alone, that is said, with resume="last-good" too."""
    bad = saved(16)
    content = torch.load(bad, weights_only=True)
    torch.save({"state_dict": content["state_dict"], "global_step": 3}, bad.with_name("weights.ckpt"))
    cut(bad)
    for resume in ("strict", "last-good"):
        with pytest.raises(BadCheckpointError, match="There is no other good checkpoint near it"):
            train(guard_with(resume=resume), resume=bad)


def test_a_file_that_is_missing(saved: Callable[..., Path], tmp_path: Path) -> None:
    """A missing file is Lightning's error, unless resume="last-good" finds a good one where it was looked for."""
    good = saved(9)
    missing = good.with_name("last.ckpt")
    with pytest.raises(FileNotFoundError, match="not found"):
        train(guard_with(), resume=missing)
    guard = guard_with(resume="last-good", dirpath=tmp_path)
    trainer, *_ = train(guard, resume=missing, epochs=1)
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


def test_observing_refuses_nothing(saved: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    """With observe=True a checkpoint of bad moments is gone on from as without the guard, with a warning."""
    bad = saved(16)
    poison(bad, "moment")
    train(guard_with(observe=True), resume=bad, epochs=2)
    assert "exp_avg_sq of parameter 2 is not finite" in caplog.text


@pytest.mark.parametrize("spoilt", [{"state_dict": {"other": torch.zeros(1)}}, {"extra": BadCheckpointError}])
def test_an_error_of_the_users_stays_theirs(saved: Callable[..., Path], spoilt: dict[str, Any]) -> None:
    """A whole file that cannot be loaded for another reason ends as it does without the guard, in all Lightnings."""
    path = saved(16)
    torch.save({**torch.load(path, weights_only=True), "callbacks": {}, **spoilt}, path)
    ends: list[tuple[type, str] | None] = []
    for guard in (None, guard_with()):
        try:
            train(guard, resume=path)
        except Exception as error:
            ends.append((type(error), str(error)))
        else:
            ends.append(None)
    assert ends[0] == ends[1]
    assert ends[0] is not None or "extra" in spoilt


def test_unknown_version_of_the_state(saved: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    """The guard's state of a version this one cannot read is left out with a warning, and the run goes on."""
    path = saved(16)
    content = torch.load(path, weights_only=True)
    (key,) = (key for key in content["callbacks"] if "NaNGuard" in key)
    assert content["callbacks"][key]["schema"] == 1
    content["callbacks"][key] = {"schema": 99, "guard": {"something": "new"}}
    torch.save(content, path)
    trainer, *_ = train(guard_with(), resume=path, epochs=2)
    assert trainer.global_step == PER_EPOCH * 2
    assert "version 99" in caplog.text
    assert "start anew" in caplog.text


def test_the_guards_hooks_are_gone_after_a_refusal(saved: Callable[..., Path]) -> None:
    """A trainer whose checkpoint was refused has nothing of the guard's left on it."""
    bad = saved(16)
    cut(bad)
    trainer = trainer_for(None, guard_with())
    data, val = Positioned(batches(count=PER_EPOCH)), DataLoader(batches(count=1), batch_size=None)
    with pytest.raises(BadCheckpointError, match="cut short"):
        trainer.fit(cosine_task(), data, val, ckpt_path=bad)
    assert "resume_start" not in vars(trainer._checkpoint_connector)

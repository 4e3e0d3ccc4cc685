"""An error inside the guard costs the guard, and not the run."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from pytorch_lightning import Callback
from torch import Tensor

from lightning_nanguard import Detector, NaNGuard, Reading
from lightning_nanguard.cli.main import main
from lightning_nanguard.guard.certification import Certification
from lightning_nanguard.guard.guard import Guard
from lightning_nanguard.guard.reading_judge import ReadingJudge
from lightning_nanguard.guard.step_check import StepCheck
from lightning_nanguard.state.step_start import StepMemory
from lightning_nanguard.trainer.repeat.kept_updates import KeptUpdates
from lightning_nanguard.trainer.repeat.step_runner import StepRunner
from lightning_nanguard.trainer.validation import ValidationWatch
from tests.helpers import Batch, FaultAt, Task, batches, differences, fit, mlp, state_of, task

pytestmark = pytest.mark.failing_guard

BROKEN = [
    (Guard, "start", 0),
    (Guard, "open_batch", 8),
    (Guard, "see_loss", 8),
    (StepMemory, "open", 8),
    (StepCheck, "fault", 8),
    (KeptUpdates, "keep", 8),
    (ReadingJudge, "judge", 8),
    (Certification, "judge", 8),
    (Guard, "end_epoch", 0),
    (Guard, "finish", 0),
    (ValidationWatch, "see", 0),
    (ValidationWatch, "judge", 0),
]


def breaks(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, after: int = 0) -> None:
    """Let a method of the guard raise from its ``after``-th call on."""
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def broken(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise LookupError("a fault of the guard")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, broken)


@pytest.mark.parametrize(("owner", "name", "after"), BROKEN, ids=[f"{o.__name__}.{n}" for o, n, _ in BROKEN])
def test_a_healthy_run_goes_on_without_the_guard(
    owner: type,
    name: str,
    after: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It ends as without the guard, bit for bit; the error is logged once with its traceback, and kept as advice."""
    bare = fit(task(), batches(count=20), folder=tmp_path / "bare", val=batches(count=2))
    breaks(monkeypatch, owner, name, after)
    guard = NaNGuard()
    run = fit(task(), batches(count=20), guard, folder=tmp_path / "guarded", val=batches(count=2))
    assert differences(state_of(bare), state_of(run)) == []
    errors = [one for one in caplog.records if one.levelname == "ERROR"]
    assert [one.exc_info is not None for one in errors] == [True]
    assert "LookupError: a fault of the guard. The run goes on without the guard." in errors[0].getMessage()
    assert [one.finding.cause for one in guard.advice] == ["guard_failed"]


def test_the_run_can_be_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the guard did before is on record, and that it failed."""
    breaks(monkeypatch, Certification, "judge", after=12)
    guard = NaNGuard(dirpath=tmp_path / "records")
    fit(task(), batches(count=20), guard, folder=tmp_path, callbacks=[FaultAt("loss", math.nan, [5])])
    assert main(["explain", str(tmp_path / "records")]) == 0
    told = capsys.readouterr().out
    assert "1 intervention" in told
    assert "non-finite loss" in told
    assert "guard failed" in told
    assert "LookupError: a fault of the guard" in told


def test_weights_that_are_bad_then_are_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the guard fails while it handles a fault, the run goes on from the last good state."""

    class Spoils(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 12:
                with torch.no_grad():
                    next(pl_module.parameters()).fill_(math.nan)
                breaks(monkeypatch, ReadingJudge, "handle")

    guard = NaNGuard(snapshot_every_n_steps=3, readback="deferred")
    run = fit(task(), batches(count=20), guard, folder=tmp_path, callbacks=[Spoils()])
    assert all(bool(torch.isfinite(one).all()) for one in run.module.parameters())
    assert guard.interventions == []


@pytest.mark.parametrize("name", ["before_save", "mend", "after_save"])
def test_a_checkpoint_is_written_without_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An error of the guard while a checkpoint is saved costs the check of it."""
    breaks(monkeypatch, Guard, name)
    path = tmp_path / "saved.ckpt"

    class Saves(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 5:
                trainer.save_checkpoint(path)

    run = fit(task(), batches(count=10), NaNGuard(), folder=tmp_path, callbacks=[Saves()])
    assert run.trainer.global_step == 10
    assert torch.load(path, weights_only=True)["global_step"] == 5
    assert "failed while a checkpoint was saved with LookupError" in caplog.text


@pytest.mark.parametrize("settings", [{}, {"observe": True}, {"readback": "deferred"}])
def test_a_detector_that_returns_a_wrong_type_ends_the_run(settings: dict[str, Any], tmp_path: Path) -> None:
    """It is the user's mistake, so the error says what to return, however readings arrive."""

    class Wrong(Detector):
        def check(self, reading: Reading) -> Any:
            return "a fault"

    with pytest.raises(TypeError, match=r"returned 'a fault', a str\. Return a Fault"):
        fit(task(), batches(count=8), NaNGuard(detectors=[Wrong()], **settings), folder=tmp_path)


@pytest.mark.parametrize("hook", ["on_train_start", "on_train_batch_start", "on_train_batch_end", "on_train_end"])
def test_a_loop_without_a_trainer(hook: str) -> None:
    """Fabric calls hooks with the arguments of the user's loop: the error says what is supported."""
    fabric = Fabric(accelerator="cpu", callbacks=[NaNGuard()])
    with pytest.raises(TypeError, match=rf"{hook} was called without a Trainer\. It does not support Fabric"):
        fabric.call(hook, *([torch.ones(1), 0] if "batch" in hook else []))


@pytest.mark.parametrize(("owner", "name"), [(StepRunner, "_guarded"), (KeptUpdates, "keep")])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_a_micro_batch_is_run_once(
    owner: type, name: str, accumulated: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the guard fails before or after it, the run is bit for bit the one without a guard."""
    options = {"accumulate_grad_batches": accumulated}
    bare = fit(task(), batches(count=12), folder=tmp_path / "bare", **options)
    breaks(monkeypatch, owner, name, after=3)
    guard = NaNGuard()
    run = fit(task(), batches(count=12), guard, folder=tmp_path / "guarded", **options)
    assert differences(state_of(bare), state_of(run)) == []
    assert [one.finding.cause for one in guard.advice] == ["guard_failed"]


def test_an_error_of_the_user_ends_the_run(tmp_path: Path) -> None:
    """An exception of ``training_step`` is raised as it was, also after the step was run again for it."""

    class Raises(Task):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            if batch_idx == 4:
                raise LookupError("a mistake of the user's")
            return super().training_step(batch, batch_idx)

    guard = NaNGuard()
    with pytest.raises(LookupError, match="a mistake of the user's"):
        fit(Raises(mlp()), batches(count=8), guard, folder=tmp_path)
    assert not guard.advice

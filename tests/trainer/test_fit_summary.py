"""The summary line of a fit: its own counts, those of its run where it was resumed, and the trials held."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_nanguard import NaNGuard
from lightning_nanguard.cli.main import main
from lightning_nanguard.record.files import read_file
from lightning_nanguard.record.trials import TRIALS_FILE, HeldTrial
from tests.helpers import batches, fit, folder_of, task, trainer_for, with_bad


def loader(*bad: int) -> DataLoader[Any]:
    """Eight batches, some of them bad."""
    return DataLoader(with_bad(*bad, count=8), batch_size=None)  # type: ignore[arg-type]


def summary_in(text: str) -> str:
    """The last summary line of a log."""
    return [line for line in text.splitlines() if "updates watched" in line][-1]


@pytest.mark.parametrize("same_folder", [True, False])
def test_a_resumed_fit_is_told_from_its_run(
    tmp_path: Path, same_folder: bool, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Console, `guard.summary()` and `nanguard explain` say which counts are the fit's and which the whole run's."""
    caplog.set_level("INFO")
    first = NaNGuard(dirpath=tmp_path / "first")
    trainer = trainer_for(tmp_path, first, max_epochs=1, limit_val_batches=0)
    trainer.fit(task(), loader(2, 4), loader())
    assert "in this fit" not in first.summary()
    trainer.save_checkpoint(tmp_path / "first" / "saved.ckpt")
    again = NaNGuard(dirpath=tmp_path / ("first" if same_folder else "second"))
    trainer_for(tmp_path, again, max_epochs=2, limit_val_batches=0).fit(
        task(), loader(3), loader(), ckpt_path=tmp_path / "first" / "saved.ckpt"
    )
    told = again.summary()
    assert "8 updates watched in this fit" in told
    assert "1 intervention (non-finite loss 1): 1 batch skipped" in told
    assert "; in the whole run: 16 updates, 3 interventions" in told
    assert summary_in(caplog.text).endswith(told)
    assert main(["explain", str(folder_of(again))]) == 0
    shown = capsys.readouterr().out
    assert "16 updates, 3 interventions in the whole run; 8 updates, 1 intervention since it was resumed" in shown
    assert ("what came before it was resumed: nanguard explain" in shown) is not same_folder


def test_a_fit_that_is_not_resumed_in_the_same_process_counts_anew(tmp_path: Path) -> None:
    """What an earlier run of the same guard met is no part of the line of the next one."""
    guard = NaNGuard(dirpath=tmp_path)
    fit(task(), with_bad(2, count=8), guard)
    fit(task(), batches(count=8), guard)
    assert guard.summary() == 'NaNGuard: 8 updates watched (act_on="certain"), no interventions'


class Unlearnable(LightningModule):
    """Targets without any relation to the inputs, at a sound rate: its loss stays where it is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        return torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05)


def test_a_trial_that_confirms_nothing_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Summary, file and `nanguard explain` say that a trial was held, over which steps, and that it changed nothing."""
    torch.manual_seed(1)
    data = DataLoader(TensorDataset(torch.randn(2400, 4), torch.randn(2400, 1)), batch_size=16)
    guard = NaNGuard(dirpath=tmp_path, act_on="evidence")
    trainer_for(tmp_path, guard, max_epochs=1, limit_val_batches=0).fit(Unlearnable(), data)
    assert len(guard.interventions) == 0
    (trial, *_) = read_file(tmp_path / TRIALS_FILE, HeldTrial.from_dict)
    assert (trial.outcome, trial.begun_step) == ("not confirmed", 40)
    assert 48 <= trial.global_step - trial.begun_step < 64  # it ends as soon as its result is known
    told = re.search(r"; (\d trials?) held \(steps (\d+) to (\d+)\), which confirmed nothing", guard.summary())
    assert told is not None
    assert int(told[2]) == trial.begun_step
    assert main(["explain", str(tmp_path)]) == 0
    assert trial.told() in capsys.readouterr().out.splitlines()


def test_a_trial_that_the_end_of_the_run_cuts_short_is_in_the_summary(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It begins after 40 updates, and another callback stops the run after 60."""

    class StopsEarly(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 60

    caplog.set_level("INFO")
    fit(task(), batches(count=200), NaNGuard(act_on="evidence"), folder=tmp_path, callbacks=[StopsEarly()])
    assert "1 trial held" in summary_in(caplog.text)
    assert "which ended without a result (the run ended first)" in summary_in(caplog.text)

"""A run whose optimizers the user's code replaces goes on guarded."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.optim import SGD, Adam

from lightning_nanguard import NaNGuard
from tests.helpers import Task, batches, differences, fit, mlp, seed_all, state_of, with_nan, words

BAD = 5


class Replaces(Task):
    """Trains with Adam at first, and with another optimizer from the second epoch on."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.trainer.optimizers = [SGD(self.parameters(), lr=0.01, momentum=0.9)]


def made() -> Replaces:
    return Replaces(mlp(norm=True), lambda parameters: Adam(parameters, lr=0.01))


def test_a_healthy_run_is_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bit for bit, with and without the guard, and one line says what happened."""
    ends = []
    for guards in ([], [NaNGuard(snapshot_every_n_steps=3)]):
        seed_all()
        run = fit(made(), batches(count=10), *guards, folder=tmp_path / str(len(guards)), max_epochs=3)
        ends.append(state_of(run))
    assert not differences(*ends)
    assert not guards[0].interventions
    assert caplog.text.count("The new ones are guarded") == 1


def test_a_bad_batch_costs_itself_alone(tmp_path: Path) -> None:
    """Before and after the change a bad batch is as if the data had never held it. All of it is one run."""
    ends, data = [], batches(count=10)
    bad = [with_nan(batch) if index == BAD else batch for index, batch in enumerate(data)]
    good = [batch for index, batch in enumerate(data) if index != BAD]
    guard = NaNGuard(snapshot_every_n_steps=3)
    for number, (given, guards) in enumerate(((bad, [guard]), (good, []))):
        seed_all()
        run = fit(made(), given, *guards, folder=tmp_path / str(number), max_epochs=3)
        ends.append(dict(run.module.state_dict()))
    assert not differences(*ends)
    assert words(guard) == [("skip",)] * 3
    assert [(one.epoch, one.batch_idx) for one in guard.interventions] == [(0, BAD), (1, BAD), (2, BAD)]
    assert len({one.run for one in guard.interventions}) == 1
    assert "30 updates watched in this fit" in guard.summary()
    assert "3 batches skipped" in guard.summary()

"""What version 0.1.0 wrote can still be read: a checkpoint, records, an incident.

The files in ``tests/data`` are of one run of 80 updates: a batch with NaN, weights that blew up three times, and with
that a skip, three rollbacks, clipping and a learning rate cut to a sixteenth.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from torch.optim import SGD
from torch.utils.data import DataLoader

from lightning_nanguard import Budget, NaNGuard, TrainingDivergedError
from lightning_nanguard.cli.main import main
from lightning_nanguard.diagnosis import bundle
from lightning_nanguard.record.files import read_records
from tests.helpers import Task, batches, differences, learner_of, mlp, non_finite, task, trainer_for, with_bad
from tests.modules import Diverge

# The checkpoint was saved in mid-epoch, with a loader that has no state: it begins anew when the run goes on.
pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")

DATA = Path(__file__).parent / "data"
CHECKPOINT = DATA / "guard_0_1_0.ckpt"
MULTIPLIER = 1 / 16


def model() -> Task:
    """What the task of the old run was made by, for ``nanguard replay``."""
    return task("mlp", lambda parameters: SGD(parameters, lr=0.05, momentum=0.9))


class FirstState(Callback):
    """The guard's state when the first batch of the resumed run begins."""

    def __init__(self, guard: NaNGuard) -> None:
        self.guard, self.state = guard, dict[str, Any]()

    def on_train_batch_start(self, *args: Any) -> None:
        self.state = self.state or self.guard.state_dict()["guard"]


def test_a_checkpoint_is_resumed_from(tmp_path: Path) -> None:
    """Multiplier, clipping, what the policy remembers, windows and counts are taken over, and the run goes on: a bad
    batch is skipped in it, and the rate stays cut."""
    old = torch.load(CHECKPOINT, weights_only=True)["callbacks"]["NaNGuard"]["guard"]
    guard = NaNGuard(snapshot_every_n_steps=5, dirpath=tmp_path, budget=Budget(window=200))
    first = FirstState(guard)
    trainer, module = trainer_for(tmp_path, guard, [first], limit_val_batches=0), model()
    loader = DataLoader(with_bad(5, count=90), batch_size=None)
    trainer.fit(module, loader, loader, ckpt_path=CHECKPOINT)

    assert len(old["policy"]["restores"]) == 3
    changed = [place for key in old for place in differences(old[key], first.state[key], key)]
    # Of what is new, gone, or kept over fewer readings nothing can be the same.
    assert [place for place in changed if not place.endswith(("only in one", "items"))] == []
    assert first.state["rate"]["multiplier"] == MULTIPLIER
    assert first.state["clipper"]["value"] == pytest.approx(0.386, abs=1e-3)
    # Lightning before 2.5 begins a batch earlier with this checkpoint, which a later one has saved.
    assert trainer.global_step in (90, 91)
    assert [(found.global_step, found.remedies) for found in guard.interventions] == [(86, ("skip",))]
    assert guard.interventions[0].lr_before == pytest.approx(0.05 * MULTIPLIER)
    assert guard.lr_multiplier == MULTIPLIER
    assert non_finite(learner_of(trainer, module)) == []


def test_a_budget_goes_on_over_versions(tmp_path: Path) -> None:
    """The rollbacks of the old run count in the new one."""
    guard = NaNGuard(snapshot_every_n_steps=2, dirpath=tmp_path, budget=Budget(max_rollbacks=3))
    trainer = trainer_for(tmp_path, guard, [Diverge(85)], limit_val_batches=0)
    loader = DataLoader(batches(count=90), batch_size=None)
    with pytest.raises(TrainingDivergedError, match="budget is used up: 3 rollbacks"):
        trainer.fit(model(), loader, loader, ckpt_path=CHECKPOINT)


def test_records_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    """Every field of every record is there, and the command tells them."""
    found = list(read_records(DATA / "interventions_0_1_0.jsonl"))
    assert [record.remedies for record in found] == [
        ("skip",),
        ("restore",),
        ("restore", "clip"),
        ("restore", "clip", "scale"),
    ]
    assert [record.global_step for record in found] == [31, 51, 57, 61]
    assert [record.cause for record in found] == [
        "non_finite_input",
        "corrupted_state",
        "learning_rate_too_high",
        "learning_rate_too_high",
    ]
    assert found[3].lr_after == pytest.approx(0.05 * MULTIPLIER)
    assert found[3].snapshot_step == 45
    assert found[3].updates_lost == 16
    assert found[3].finding is not None
    assert found[3].finding.evidence["loss_now"] == float("inf")
    assert main(["explain", str(DATA / "interventions_0_1_0.jsonl")]) == 0
    assert "went back to step 45" in capsys.readouterr().out


def test_an_incident_is_read_and_replayed(capsys: pytest.CaptureFixture[str]) -> None:
    """Fault, evidence, batch and state are there, whatever evidence is called today, and the fault is seen again."""
    pytest.importorskip("safetensors")
    found = bundle.read(DATA / "bundle_0_1_0")
    assert (found.fault.kind, found.fault.scope, found.evidence.step) == ("non_finite_loss", "batch", 31)
    assert found.evidence.first == found.evidence.loss_unit == pytest.approx(0.5038957)
    assert found.evidence.levels == pytest.approx((0.0451599, 0.0591997, 0.5038957))
    assert [micro.index for micro in found.batches] == [30]
    # The matrix product of these targets depends on the processor in its last bits.
    torch.testing.assert_close(found.batches[0].batch[1], batches(count=31)[30][1])
    assert set(found.state) == {f"net.{name}" for name in mlp().state_dict()}
    assert main(["replay", str(DATA / "bundle_0_1_0"), "--module", "tests.test_compatibility:model"]) == 0
    assert "non_finite_input" in capsys.readouterr().out

"""The diagnosis of one fit: causes of faults, advice, incidents; what is found lies in ``tests/diagnosis``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from torch import nn

from lightning_nanguard import Case, Detector, Fault, Finding, NaNGuard, Reading, TrainingDivergedError
from lightning_nanguard.diagnosis import bundle
from lightning_nanguard.thresholds import Thresholds
from lightning_nanguard.thresholds.records import RecordsThresholds
from tests.helpers import OUTPUTS, Task, batches, differences, fit, mlp, state_of, task, with_bad


class Asks(Callback):
    """Asks for examinations in mid-run."""

    def __init__(self, guard: NaNGuard, times: int = 1) -> None:
        self.guard = guard
        self.batches = range(20, 20 + times)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx in self.batches:
            self.guard.examine()


def test_a_fault_has_its_cause_and_an_incident(tmp_path: Path) -> None:
    """A bad batch is looked at where it was met; what it can be replayed from is kept once."""
    pytest.importorskip("safetensors")
    guard = NaNGuard(snapshot_every_n_steps=4, dirpath=tmp_path, bundle_dir=tmp_path / "kept")
    run = fit(task(), with_bad(9), guard, folder=tmp_path)
    (found,) = guard.interventions
    assert found.cause == "non_finite_input"
    (folder,) = (tmp_path / "kept").iterdir()
    kept = bundle.read(folder)
    assert (kept.module, kept.fault.kind, kept.batches[0].index) == ("tests.helpers:Task", "non_finite_loss", 9)
    assert set(kept.state) == set(run.module.state_dict())


def test_preflight_and_examination_give_advice_and_leave_no_trace(tmp_path: Path) -> None:
    """The untrained model is looked at before the first step, and the run where that is asked for: as advice, with the
    occasion, and the run has the bits of one without."""
    guard = NaNGuard(snapshot_every_n_steps=4, dirpath=tmp_path, preflight=True, examine_after=16)
    data = [(x * 1e4, y) for x, y in batches(count=30)]
    watched = fit(task(), data, guard, folder=tmp_path, callbacks=[Asks(guard)])
    assert {advice.occasion for advice in guard.advice} >= {"preflight"}
    assert list(guard.interventions) == []
    assert differences(state_of(watched), state_of(fit(task(), data, folder=tmp_path))) == []


@pytest.mark.parametrize(("places", "most", "given"), [("aab", 9, "ab"), ("abcd", 2, "ab")])
def test_the_same_advice_is_given_once(places: str, most: int, given: str, tmp_path: Path) -> None:
    """Advice about one cause and place is given once when asked, and there is never too much of it."""
    left = list(places)

    def rule(case: Case) -> Finding | None:
        return Finding("odd", 1.0, place=left.pop(0)) if case.course and left else None

    guard = NaNGuard(rules=[rule], thresholds=Thresholds(records=RecordsThresholds(advice_per_fit=most)))
    fit(task(), batches(count=30), guard, folder=tmp_path, callbacks=[Asks(guard, len(places))])
    assert "".join(advice.finding.place for advice in guard.advice if advice.finding.cause == "odd") == given
    assert not left


def test_no_advice_at_all_is_refused(tmp_path: Path) -> None:
    """The bound on advice is at least 1."""
    guard = NaNGuard(thresholds=Thresholds(records=RecordsThresholds(advice_per_fit=0)))
    with pytest.raises(ValueError, match="advice_per_fit=0"):
        fit(task(), batches(count=1), guard, folder=tmp_path)


def test_examining_outside_of_a_fit() -> None:
    """There is nothing to examine then."""
    with pytest.raises(RuntimeError, match="fit"):
        NaNGuard().examine()


class KeepsGradients(Task):
    """Manual optimization that never clears its gradients."""

    def __init__(self) -> None:
        super().__init__(mlp())
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer: Any = self.optimizers()
        optimizer.step()


class FindsAt(Detector):
    """Finds a fault of the learner and one of a batch."""

    def check(self, reading: Reading) -> Fault | None:
        scope: Any = {80: "learner", 90: "batch"}.get(reading.step)
        return None if scope is None else Fault("mine", scope, "loss", 9.0, "mine", conclusive=True)


def test_a_mistake_of_the_first_updates_explains_a_divergence(tmp_path: Path) -> None:
    """After the advice that gradients are added up, the rate is not blamed for a divergence. A fault of a batch has its
    own cause."""

    def rule(case: Case) -> Finding | None:
        causes = {"learner": "learning_rate_too_high", "batch": "bad_batch"}
        scope = case.fault.scope
        return Finding(causes[scope], 1.0, scope=scope) if case.fault.kind == "mine" else None

    guard = NaNGuard(snapshot_every_n_steps=8, dirpath=tmp_path, rules=[rule], detectors=[FindsAt()])
    fit(KeepsGradients(), batches(count=96), guard, folder=tmp_path)
    assert [advice.finding.cause for advice in guard.advice] == ["gradient_not_zeroed"]
    assert [found.cause for found in guard.interventions] == ["gradient_not_zeroed", "bad_batch"]


class FirstOutput(Task):
    """A regression by one of several outputs."""

    def loss(self, batch: Any, name: str) -> torch.Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x)[:, 0].float(), y[:, 0].float())


def first_output() -> FirstOutput:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, OUTPUTS))
    return FirstOutput(net, lambda p: torch.optim.SGD(p, 0.1))


def test_a_gradient_that_overflows_in_float16_alone(tmp_path: Path) -> None:
    """With weights in float16 the number format is named, and no sample; in float32 the same gradient is accepted."""
    data = [(x, torch.full((len(x), OUTPUTS), 5e4)) for x, _ in batches(count=4)]
    for precision, causes in (("32-true", []), ("16-true", ["low_precision_overflow"])):
        guard = NaNGuard(dirpath=tmp_path / precision)
        fit(first_output(), data, guard, folder=tmp_path, precision=precision, max_steps=1)
        assert [one.cause for one in guard.interventions] == causes
    found = guard.interventions[0].finding
    assert found is not None
    assert (found.samples, found.scope) == ((), None)
    assert "backward of" in found.place


def test_a_head_with_unused_outputs_that_diverges(tmp_path: Path) -> None:
    """The only bias with a gradient is no memory fault if the other weights have left their range, too."""
    data = [(x, torch.full((len(x), OUTPUTS), 3e4)) for x, _ in batches(count=12)]
    guard = NaNGuard(dirpath=tmp_path)
    fit(first_output(), data, guard, folder=tmp_path)
    assert "corrupted_state" not in {one.cause for one in guard.interventions}
    assert guard.interventions[0].finding is not None
    assert guard.interventions[0].finding.scope == "learner"


class CountsOfZero(Task):
    """Keeps means of what each code was given, and divides by how often it was given something."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(mlp(), lambda p: torch.optim.Adam(p, 2e-3))
        self.register_buffer("means", torch.ones(4))

    def loss(self, batch: Any, name: str) -> torch.Tensor:
        used = self.means.detach().clone()
        counts = torch.tensor([3.0, 2.0, 1.0, 0.0])
        self.means.copy_(torch.ones(4) / counts)
        return super().loss(batch, name) * (used - used.detach().max() + 1.0).exp().mean()


def test_a_buffer_that_a_forward_pass_makes_infinite(tmp_path: Path) -> None:
    """It was finite before the first update, and no cut of the rate is told as a change of the schedule."""
    guard = NaNGuard(dirpath=tmp_path)
    with pytest.raises(TrainingDivergedError, match="buffer means"):
        fit(CountsOfZero(), batches(count=40), guard, folder=tmp_path)
    assert {one.cause for one in guard.interventions} == {"corrupted_state"}
    assert all(one.finding is not None and one.finding.place == "buffer means" for one in guard.interventions)

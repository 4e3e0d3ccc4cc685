"""The cause, the place and the samples of faults of every kind, and that looking for them leaves no trace."""

from __future__ import annotations

import json
import math
import random
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule
from torch import Tensor, nn, optim

from lightning_nanguard import Case, Fault, Finding, NaNGuard, TrainingDivergedError
from lightning_nanguard.diagnosis.diagnostician import Diagnostician
from lightning_nanguard.diagnosis.rule_set import RuleSet
from lightning_nanguard.record.files import read_records
from lightning_nanguard.record.messages import tell
from lightning_nanguard.record.text import in_words
from lightning_nanguard.state.batch_history import BatchHistory, MicroBatch
from lightning_nanguard.state.learner import Learner
from lightning_nanguard.state.ring import Ring
from lightning_nanguard.state.snapshot import capture
from lightning_nanguard.thresholds.diagnosis import DEFAULT
from lightning_nanguard.types import Evidence
from tests.diagnosis.failing_runs import AT, RUNS, STEPS, FailingRun, Lossy, mse
from tests.helpers import (
    Batch,
    FaultAt,
    Task,
    batches,
    copied,
    data_for,
    differences,
    fit,
    folder_of,
    learner_of,
    random_state,
    task,
)

NAN, INF = math.nan, math.inf


def first(guard: NaNGuard) -> Finding | None:
    assert len(guard.interventions), "nothing happened"
    return guard.interventions[0].finding


@pytest.mark.parametrize(
    ("cause", "run", "place", "samples"), [(r[0], *r[2:]) for r in RUNS], ids=[f"{r[0]}-{r[1]}" for r in RUNS]
)
def test_the_cause_is_named(cause: str, run: FailingRun, place: str, samples: tuple[int, ...], tmp_path: Path) -> None:
    """The first intervention of a failing run names the cause, the place and, for data, the samples."""
    guard, _ = run(tmp_path)
    finding = first(guard)
    assert finding is not None
    assert finding.cause == cause, finding
    assert place in finding.place
    assert finding.samples == samples
    assert finding.suggestion.endswith((".", ")"))
    assert guard.interventions[0].cause == cause
    record = read_records(folder_of(guard) / "interventions.jsonl")[0]
    assert record.finding == finding
    assert f"why: {in_words(cause)}" in tell(record)


# ---------------------------------------------------------------------------------------------------- other ways to run


@pytest.mark.parametrize("model", ["mlp", "norm", "cnn", "gru", "transformer", "embedding"])
def test_a_healthy_run_has_no_finding(model: str, tmp_path: Path) -> None:
    """Nothing is looked for where nothing happened."""
    guard = NaNGuard()
    fit(task(model), data_for(model, 40), guard, folder=tmp_path)
    assert [found.finding for found in guard.interventions] == []


@pytest.mark.parametrize(
    ("kind", "value", "cause"),
    [
        ("loss", NAN, "unknown_operation"),
        ("flash", NAN, "transient"),
        ("gradient", INF, "changed_gradient"),
        ("gradient", 1e12, "exploding_gradient"),
    ],
)
@pytest.mark.parametrize("model", ["mlp", "norm", "transformer"])
def test_nothing_is_made_up(model: str, kind: str, value: float, cause: str, tmp_path: Path) -> None:
    """A gradient that neither the batch, nor an operation, nor the weights explain was changed by a hook, and of a NaN
    that was put into the loss the line is told; what is gone when the step is made again is transient, and a finite
    gradient is told by its size."""
    guard = NaNGuard(snapshot_every_n_steps=5, act_on="evidence")
    fit(task(model), data_for(model, STEPS), guard, folder=tmp_path, callbacks=[FaultAt(kind, value, AT)])
    assert len(guard.interventions) == 1
    finding = first(guard)
    assert finding is not None
    assert finding.cause == cause


@pytest.mark.parametrize("model", ["manual", "norm"])
def test_without_a_replay_the_batch_is_looked_at(model: str, tmp_path: Path) -> None:
    """Under manual optimization and with ``observe=True`` nothing is run again, and bad samples are named."""
    guard = NaNGuard(observe=model == "norm")
    steps = Counted()
    fit(task(model), data_for(model, 12), guard, folder=tmp_path, callbacks=[FaultAt("input", NAN, 5), steps])
    finding = first(guard)
    assert finding is not None
    assert (finding.cause, finding.samples, finding.place) == ("non_finite_input", (1,), "field 0 of the batch")
    assert steps.forwards == steps.batches * (2 if model == "manual" else 1)


class Counted(Callback):
    """Counts forward passes of the network and batches."""

    def __init__(self) -> None:
        self.forwards = self.batches = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.net[0].register_forward_hook(self._count)

    def _count(self, *args: Any) -> None:
        self.forwards += 1

    def on_train_batch_end(self, *args: Any) -> None:
        self.batches += 1


@pytest.mark.parametrize("fused", [True, False], ids=["held back", "reached the weights"])
def test_read_late_the_faulty_batch_is_found(fused: bool, tmp_path: Path) -> None:
    """In deferred readback the batch at hand is another one: the faulty one is kept, and its samples are named."""
    guard = NaNGuard(readback="deferred")
    module = task("mlp", lambda parameters: optim.AdamW(parameters, lr=0.01, fused=fused))
    data = data_for("mlp", 12)
    data[5][0][3, 2] = NAN
    fit(module, data, guard, folder=tmp_path)
    assert [(one.cause, one.finding.samples) for one in guard.interventions if one.finding is not None] == [
        ("non_finite_input", (3,))
    ]


@pytest.mark.parametrize("fused", [True, False], ids=["held back", "reached the weights"])
def test_read_late_the_operation_is_found(fused: bool, tmp_path: Path) -> None:
    """A fault that reached the weights is run again from the last good state; they would make anything NaN."""
    guard = NaNGuard(readback="deferred", snapshot_every_n_steps=2)
    torch.manual_seed(0)
    module = Lossy(
        lambda net, x, y: mse(net, x, y) + (0 * torch.log((x[:, 0] < 50).float())).mean(),
        optimizer=lambda parameters: optim.AdamW(parameters, lr=0.01, fused=fused),
    )
    data = batches(count=12)
    data[5][0][3, 0] = 100.0
    fit(module, data, guard, folder=tmp_path)
    assert [(one.cause, one.finding.samples) for one in guard.interventions if one.finding is not None] == [
        ("log_of_zero", (3,))
    ]


def test_the_error_of_a_lost_run_says_why(tmp_path: Path) -> None:
    """A run that never had a good step is stopped with the cause, its place and what to do."""
    guard = NaNGuard()
    torch.manual_seed(0)
    module = Lossy(lambda net, x, y: mse(net, x, torch.log(y - 100)))
    with pytest.raises(
        TrainingDivergedError, match=r"why: target_out_of_domain in training_step \(log, .*above 0"
    ) as e:
        fit(module, batches(count=70), guard, folder=tmp_path)
    assert e.value.finding is not None
    assert e.value.finding == guard.interventions[-1].finding
    assert e.value.finding.evidence["operation"] == "log"
    json.dumps(guard.interventions[-1].to_dict(), allow_nan=False)


# ---------------------------------------------------------------------------------------------------- no trace


class Restless(Task):
    """Batch norm, dropout, a metric, and a frozen average and a buffer that every step moves."""

    def __init__(self) -> None:
        net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2))
        super().__init__(net)
        self.average = nn.Parameter(torch.zeros(8, 6), requires_grad=False)
        self.register_buffer("queue", torch.zeros(300, 100))

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        with torch.no_grad():
            self.average.lerp_(self.net[0].weight, 0.1)
            self.queue += 1
        loss = self.loss(batch, "loss")
        return {"loss": loss + 0 * torch.log((batch[0][:, 0] < 50).float()).sum()}


def everything(trainer: Any, module: LightningModule) -> dict[str, Any]:
    """All that a look might leave behind."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return copied(
        {
            **learner_of(trainer, module),
            "random": random_state(),
            "gradients": {name: p.grad for name, p in module.named_parameters()},
            "training": [one.training for one in module.modules()],
            "hooks": [len(getattr(one, name)) for one in module.modules() for name in hooks],
            "global hooks": [len(getattr(nn.modules.module, f"_global{name}")) for name in hooks[:2]],
            "anomaly": [torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled(), torch.is_grad_enabled()],
            "metrics": [dict(trainer.callback_metrics), dict(trainer.logged_metrics)],
            "results": {key: [item.value, item.cumulated_batch_size] for key, item in trainer._results.items()},
            "plugin": sorted(vars(trainer.precision_plugin)),
        }
    )


@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 2}, {"precision": "16-mixed"}], ids=["plain", "accumulating", "fp16"]
)
def test_a_replay_leaves_no_trace(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random streams, weights, buffers, metrics, gradients, hooks and logged values are bit for bit as before."""
    left: list[str] = []
    found: list[Finding | None] = []
    original = Diagnostician.diagnose

    def watched(self: Diagnostician, *args: Any) -> Finding | None:
        module = self._learner.module
        before = everything(module.trainer, module)
        found.append(original(self, *args))
        left.extend(differences(before, everything(module.trainer, module)))
        return found[-1]

    monkeypatch.setattr(Diagnostician, "diagnose", watched)
    data = data_for("norm", 20)
    data[12][0][3, 0] = 100.0
    torch.manual_seed(0)
    fit(Restless(), data, NaNGuard(), folder=tmp_path, **options)
    assert [(one.cause, one.samples) for one in found if one is not None] == [("log_of_zero", (3,))]
    assert left == []


def test_a_look_that_fails_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong while the cause is looked for, the run goes on as if nothing had been looked for."""

    def broken(*args: Any, **options: Any) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr("lightning_nanguard.diagnosis.diagnostician.replay", broken)
    guard = NaNGuard()
    fit(task("norm"), data_for("norm", 12), guard, folder=tmp_path, callbacks=[FaultAt("input", NAN, 5)])
    assert [found.cause for found in guard.interventions] == ["non_finite_input"]
    monkeypatch.setattr("lightning_nanguard.diagnosis.diagnostician.batch_clues", broken)
    fit(task("norm"), data_for("norm", 12), guard, folder=tmp_path, callbacks=[FaultAt("input", NAN, 5)])
    assert [found.cause for found in guard.interventions] == ["non_finite_input", None]


def test_replays_become_rare() -> None:
    """A fault that keeps coming back is replayed ever more rarely, and its batch is looked at every time."""
    net = nn.Linear(2, 1)
    runs: list[int] = []

    def step(micro: MicroBatch, full_precision: bool) -> Tensor:
        runs.append(micro.index)
        return net(micro.batch).log().sum() * NAN

    tape = BatchHistory(torch.device("cpu"))
    tape.add(1, 0, torch.ones(3, 2))
    limits = replace(DEFAULT, replay=replace(DEFAULT.replay, other_draws=0))
    doctor = Diagnostician(Learner(net, []), Ring(), step, nullcontext, thresholds=limits)
    fault = Fault("non_finite_loss", "batch", "loss", NAN)
    seen = []
    for number in range(20):
        for _ in range(2):  # asked again about the same update, it answers from what it has seen
            doctor.diagnose(fault, Evidence(step=number), tape.of(1), "replay")
        seen.append(len(runs))
    assert seen == [2, 4, 6, 8, 8, 8, 8, 10, 10, 10, 10, 10, 10, 10, 10, 12, 12, 12, 12, 12]
    tape.add(2, 1, torch.full((3, 2), NAN))
    assert doctor.diagnose(fault, Evidence(step=99), tape.of(2), "replay") is not None


def test_what_was_found_before_is_told_of_a_fault_that_is_not_run_again(tmp_path: Path) -> None:
    """Every fault of a kind has a finding: of one that was not run again that of an earlier one, as such."""
    x = [batch[0].clone() for batch in batches(count=STEPS)]
    bad = [12, 14, 16, 18, 20, 22]
    for index in bad:
        x[index][3, 0] = 20.0
    data = [(one, batch[1]) for one, batch in zip(x, batches(count=STEPS), strict=True)]

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return mse(net, x, y) + torch.lgamma(torch.where(x[:, :1] > 15, 0.0, net(x).square() + 1)).square().mean() * 0

    guard = NaNGuard(snapshot_every_n_steps=5)
    fit(Lossy(loss), data, guard, folder=tmp_path)
    found = [one.finding for one in guard.interventions]
    assert [one is not None and one.cause for one in found] == ["unknown_operation"] * len(bad)
    told = [one for one in found if one is not None]
    assert told[0].samples == (3,)
    assert "first non-finite value of sample 3: lgamma, test_diagnostician.py:" in told[0].suggestion
    assert told[4].samples == ()
    assert told[4].suggestion.startswith("not run again; most likely as at update ")
    assert told[4].confidence < told[0].confidence
    assert all(one.lr_before == one.lr_after for one in guard.interventions)


@pytest.mark.parametrize(
    "draw", [lambda: torch.rand(()), lambda: torch.tensor(random.random())], ids=["torch", "Python"]
)
def test_a_fault_that_depends_on_the_draw_is_told_as_such(draw: Any, tmp_path: Path) -> None:
    """It is finite with other random numbers; the batch is skipped, and the rate is left alone."""

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return mse(net, x, y) - 0.01 * torch.log((draw() - 0.1).clamp(min=0.0))

    random.seed(0)
    torch.manual_seed(0)
    guard = NaNGuard()
    fit(Lossy(loss), batches(count=60), guard, folder=tmp_path)
    assert {one.cause for one in guard.interventions} == {"random_draw"}
    assert {one.remedies for one in guard.interventions} == {("skip",)}
    finding = first(guard)
    assert finding is not None
    assert "training_step (log, test_diagnostician.py:" in finding.place
    assert (finding.samples, finding.rows) == ((), ()), "the draw is at fault, and no sample"
    assert guard.lr_multiplier == 1.0


@pytest.mark.parametrize(("rows", "alone"), [(slice(None), False), (slice(1), True)], ids=["whole", "an element"])
def test_a_weight_out_of_proportion_is_compared_without_a_batch(rows: slice, alone: bool) -> None:
    """Whether it grew as a whole is asked of the last good state, also where nothing may be run again."""
    net = nn.Linear(16, 1)
    learner, ring = Learner(net, []), Ring()
    ring.add(capture(learner, step=0, global_step=0))
    ring.certify()
    with torch.no_grad():
        net.weight[0, rows] = 1e6 * torch.rand(16)[rows] + 1e6
        net.weight[0, 1:] += 0.01
    seen: list[Case] = []
    rules = RuleSet([lambda case: seen.append(case)])
    doctor = Diagnostician(learner, ring, lambda micro, full: None, nullcontext, rules=rules)
    fault = Fault("implausible_state", "state", "parameter weight", rate_may_cause=True)
    doctor.diagnose(fault, Evidence(step=9), (), "nothing")
    assert seen[0].clues.moved_alone is alone


def test_what_was_found_before_says_more_than_a_guess() -> None:
    """A fault that is not run again has the cause that was found here, and not a guess from its batch alone."""
    net = nn.Linear(2, 1)
    tape = BatchHistory(torch.device("cpu"))
    tape.add(1, 0, torch.tensor([[90.0, 0.0], [80.0, 5.0]]))
    doctor = Diagnostician(Learner(net, []), Ring(), lambda micro, full: net(micro.batch).sum() * 0 / 0, nullcontext)
    fault = Fault("non_finite_loss", "batch", "loss", NAN)
    causes = [doctor.diagnose(fault, Evidence(step=n), tape.of(1), "replay") for n in range(1, 6)]
    assert [one and one.cause for one in causes] == ["division_by_zero"] * 5
    assert causes[4] is not None
    assert causes[4].suggestion.startswith("not run again")

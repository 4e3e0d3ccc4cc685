"""Deferred readback: what the host learns late is undone to the bit."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader

from lightning_nanguard import NaNGuard
from lightning_nanguard.act.skip import skips_on_device
from lightning_nanguard.measure.readings import PendingReading
from lightning_nanguard.thresholds import BatchesThresholds, Thresholds
from lightning_nanguard.thresholds.batches import RepeatedStepsThresholds
from lightning_nanguard.thresholds.decision import DecisionThresholds
from tests.helpers import (
    FaultAt,
    Task,
    TwoOptimizers,
    batches,
    data_for,
    differences,
    fit,
    learner_of,
    mlp,
    non_finite,
    state_of,
    task,
    trainer_for,
    with_nan,
    words,
)
from tests.scenarios.test_skips import KEEPS_NO_WINDOW, left_behind, without

NOTHING_AGAIN = Thresholds(batches=BatchesThresholds(repeated=RepeatedStepsThresholds(updates_again=0)))
"""Without updates that are made again, a fault that is gone by then is skipped like one that comes back."""


def fused(parameters: list[nn.Parameter]) -> optim.Optimizer:
    return optim.AdamW(parameters, lr=0.01, fused=True)


def plain(parameters: list[nn.Parameter]) -> optim.Optimizer:
    return optim.AdamW(parameters, lr=0.01)


def rectified() -> nn.Module:
    """A network that large inputs reach, as they do not where units saturate."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))


def sgd(parameters: list[nn.Parameter]) -> optim.Optimizer:
    return optim.SGD(parameters, lr=0.01)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readings arrive as late as they may, as from a device that is far behind."""
    monkeypatch.setattr(PendingReading, "arrived", lambda self: False)


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("bad", [[7], [7, 8], [7, 8, 9], [0, 1], [22, 23]], ids=str)
@pytest.mark.parametrize("kind", ["input", "loss", "gradient"])
def test_late_skips_are_exact(kind: str, bad: list[int], tmp_path: Path) -> None:
    """Bad batches, also several in a row under batch norm, leave weights, moments and buffers as if never seen, cost no
    rollback, and are on record under their own clock."""
    data = data_for("norm", 24)
    guard = NaNGuard(snapshot_every_n_steps=3, readback="deferred", thresholds=NOTHING_AGAIN)
    guarded = fit(task("norm", fused), data, guard, folder=tmp_path, callbacks=[FaultAt(kind, math.nan, bad)])
    never = fit(task("norm", fused), without(data, *bad), folder=tmp_path)
    assert words(guard) == [("skip",)] * len(bad)
    one, other = left_behind(guarded), left_behind(never)
    for part in ("parameters", "buffers", "optimizers"):
        assert differences(one[part], other[part]) == []
    assert [(i.global_step, i.batch_idx, i.updates_lost) for i in guard.interventions] == [(b + 1, b, 0) for b in bad]


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("bad", [[0], [0, 1], [0, 1, 5], [5]], ids=str)
def test_momentum_that_a_skipped_step_would_have_begun(bad: list[int], tmp_path: Path) -> None:
    """Fused SGD leaves uninitialised memory as momentum where its first step is skipped on the device: that one is
    read before it is made."""

    def momentum(parameters: list[nn.Parameter]) -> optim.Optimizer:
        return optim.SGD(parameters, lr=0.02, momentum=0.9, dampening=0.1, fused=True)

    data = data_for("norm", 12)
    guard = NaNGuard(snapshot_every_n_steps=3, readback="deferred", thresholds=NOTHING_AGAIN)
    guarded = fit(task("norm", momentum), data, guard, folder=tmp_path, callbacks=[FaultAt("input", math.nan, bad)])
    never = fit(task("norm", momentum), without(data, *bad), folder=tmp_path)
    assert words(guard) == [("skip",)] * len(bad)
    one, other = left_behind(guarded), left_behind(never)
    for part in ("parameters", "buffers", "optimizers"):
        assert differences(one[part], other[part]) == []


@pytest.mark.usefixtures("late")
def test_one_forward_that_two_optimizers_learn_from(tmp_path: Path) -> None:
    """What a generator made serves both losses of a GAN: that batch norm's statistics are decided on behind the first
    step must not stand in the way of the second backward."""
    ended = []
    for guard in (None, NaNGuard(snapshot_every_n_steps=3, readback="deferred")):
        torch.manual_seed(0)
        run = fit(SharedForward(), batches(count=24), guard, folder=tmp_path)
        ended.append(state_of(run))
    assert differences(*ended) == []


class SharedForward(Task):
    """A GAN in small, whose generator runs once a batch."""

    def __init__(self) -> None:
        super().__init__(mlp(norm=True))
        self.automatic_optimization = False
        self.judge = nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        judging, making = self.optimizers()
        made = self.net(batch[0])
        for optimizer, shown, wanted in ((judging, made.detach(), 0.0), (making, made, 1.0)):
            optimizer.zero_grad()
            self.manual_backward((self.judge(shown) - wanted).square().mean())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [fused(list(part.parameters())) for part in (self.judge, self.net)]


@pytest.mark.usefixtures("late")
def test_gone_on_with_a_fused_optimizer(tmp_path: Path) -> None:
    """The state of a run without fused steps turns them off where it is loaded, though the optimizer was made with
    them: nothing is held back on the device then, and a bad update is undone."""
    kept = tmp_path / "kept.ckpt"
    first = fit(task("norm", plain), data_for("norm", 12), folder=tmp_path)
    first.trainer.save_checkpoint(kept)
    guard = NaNGuard(snapshot_every_n_steps=3, readback="deferred")
    fault = FaultAt("input", math.nan, 8)
    trainer, module = trainer_for(tmp_path, guard, [fault], max_epochs=2, limit_val_batches=0), task("norm", fused)
    loader = DataLoader(data_for("norm", 12), batch_size=None)
    trainer.fit(module, loader, loader, ckpt_path=kept)
    assert words(guard) == [("restore", "redo")]
    assert non_finite(learner_of(trainer, module)) == []


def test_readback_is_chosen_by_what_the_optimizer_does_now(tmp_path: Path) -> None:
    """An optimizer whose fused steps a checkpoint turned off cannot skip on the device."""
    net = nn.Linear(2, 2)
    ours, other = fused(list(net.parameters())), plain(list(net.parameters()))
    assert skips_on_device(ours)
    assert not skips_on_device(other)
    ours.load_state_dict(other.state_dict())
    assert not skips_on_device(ours)


@pytest.mark.usefixtures("late")
def test_statistics_that_batches_spoil_are_watched_before_updates(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A finite batch that ruins batch norm's statistics is undone once it shows; from then on such a batch is skipped,
    though numbers come late."""
    guard = NaNGuard(snapshot_every_n_steps=4, readback="deferred")
    fault = FaultAt("input", 1e15, [130, 145, 160])
    run = fit(task("norm", plain), data_for("norm", 180), guard, folder=tmp_path, callbacks=[fault])
    assert words(guard) == [("restore", "redo"), ("skip",), ("skip",)]
    assert caplog.text.count("a batch made a buffer bad") == 1
    assert max(float(buffer.abs().max()) for buffer in run.module.buffers()) < 1e6


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("kind", ["input", "loss", "gradient"])
def test_late_rollbacks_say_what_they_cost(kind: str, tmp_path: Path) -> None:
    """With any other optimizer the run ends in a certified state from before the fault, and says how many updates that
    cost: none where they were made again."""
    data = data_for("norm", 24)
    guard = NaNGuard(snapshot_every_n_steps=4, readback="deferred")
    run = fit(task("norm", plain), data, guard, folder=tmp_path, callbacks=[FaultAt(kind, math.nan, 15)])
    (found,) = guard.interventions
    # The callback that spoils the input or the gradient is not called when the step is made again.
    assert found.remedies == (("restore",) if kind == "loss" else ("restore", "redo"))
    assert (found.global_step, found.batch_idx) == (16, 15)
    assert found.snapshot_step is not None
    assert found.snapshot_step <= 15
    # Read two updates later, when those have been made on lost weights.
    assert found.updates_lost == (18 - found.snapshot_step if kind == "loss" else 0)
    assert non_finite(state_of(run)["state_dict"]) == []
    assert guard.lr_multiplier == 1.0


@pytest.mark.usefixtures("late")
def test_bad_batches_that_keep_coming_are_judged_before_their_update(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the device holds nothing back, one rollback for a bad batch is enough: from then on each is skipped, the
    budget lasts, and it is said once."""
    bad = list(range(9, 300, 12))
    guard = NaNGuard(snapshot_every_n_steps=4, readback="deferred")
    data = [with_nan(batch) if index in bad else batch for index, batch in enumerate(data_for("norm", 300))]
    run = fit(task("norm", plain), data, guard, folder=tmp_path)
    assert words(guard) == [("restore",)] + [("skip",)] * (len(bad) - 1)
    assert non_finite(state_of(run)["state_dict"]) == []
    assert guard.lr_multiplier == 1.0
    assert caplog.text.count("reads the next 1000 updates before they are made") == 1


@pytest.mark.usefixtures("late")
def test_spikes_that_keep_coming_with_a_fused_optimizer(tmp_path: Path) -> None:
    """The device holds back what is not finite only: after one finite spike that had to be undone the others are
    skipped, and no budget of rollbacks is used up."""
    bad = list(range(30, 400, 12))
    guard = NaNGuard(snapshot_every_n_steps=4, readback="deferred", act_on="evidence")
    fault = FaultAt("input", 1e6, bad)
    run = fit(Task(rectified(), fused), data_for("mlp", 400), guard, folder=tmp_path, callbacks=[fault])
    assert words(guard) == [("restore", "redo")] + [("skip",)] * (len(bad) - 1)
    assert guard.lr_multiplier == 1.0
    assert max(float(weight.abs().max()) for weight in state_of(run)["state_dict"].values()) < 10.0


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("make", [fused, plain], ids=["fused", "plain"])
def test_batches_out_of_all_proportion_are_undone_by_default(make: Callable[..., Any], tmp_path: Path) -> None:
    """Batches whose inputs and gradients are a million times as large as before are certainly bad, without any further
    evidence: the first is undone, the others are skipped."""
    bad = range(30, 200, 12)
    data = [(x * 1e6, y) if index in bad else (x, y) for index, (x, y) in enumerate(data_for("mlp", 200))]
    guard = NaNGuard(snapshot_every_n_steps=4, readback="deferred")
    run = fit(Task(rectified(), make), data, guard, folder=tmp_path)
    assert words(guard) == [("restore",)] + [("skip",)] * (len(bad) - 1)
    assert [found.batch_idx for found in guard.interventions] == [*bad]
    assert guard.lr_multiplier == 1.0
    assert max(float(weight.abs().max()) for weight in state_of(run)["state_dict"].values()) < 10.0


@pytest.mark.usefixtures("late")
def test_after_a_while_updates_are_read_late_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without a further fault the run goes back to waiting for nothing; twice as long each time that proved wrong."""
    thresholds = Thresholds(decision=DecisionThresholds(careful=20))
    guard = NaNGuard(snapshot_every_n_steps=4, readback="deferred", thresholds=thresholds)
    fault = FaultAt("input", math.nan, [10, 25, 50, 85, 110])
    run = fit(task("norm", plain), data_for("norm", 130), guard, folder=tmp_path, callbacks=[fault])
    assert words(guard) == [("restore", "redo"), ("skip",), ("restore", "redo"), ("skip",), ("restore", "redo")]
    assert [f"reads the next {count} updates before" in caplog.text for count in (20, 40, 80)] == [True] * 3
    assert non_finite(state_of(run)["state_dict"]) == []


@pytest.mark.usefixtures("late")
def test_a_resumed_run_is_as_careful_as_the_one_it_goes_on_from(tmp_path: Path) -> None:
    """What an update that had to be undone has taught is in the checkpoint."""
    kept, bad = tmp_path / "kept.ckpt", FaultAt("input", math.nan, 10)
    first = NaNGuard(snapshot_every_n_steps=4, readback="deferred")
    run = fit(task("norm", plain), data_for("norm", 20), first, folder=tmp_path, callbacks=[bad])
    run.trainer.save_checkpoint(kept)
    guard = NaNGuard(snapshot_every_n_steps=4, readback="deferred")
    trainer = trainer_for(tmp_path, guard, [FaultAt("input", math.nan, 10)], max_epochs=2, limit_val_batches=0)
    loader = DataLoader(data_for("norm", 20), batch_size=None)
    trainer.fit(task("norm", plain), loader, loader, ckpt_path=kept)
    assert (words(first), words(guard)) == ([("restore", "redo")], [("skip",)])


@pytest.mark.usefixtures("late")
def test_a_stretch_of_corrupt_batches_early_in_a_run(tmp_path: Path) -> None:
    """Batches a thousand times too large in the first updates are told from a beginning by what is in them, though
    they are read late; behind the rollback they do not become what is usual."""
    data = [(x * 1e3, y) if 8 <= index < 30 else (x, y) for index, (x, y) in enumerate(data_for("mlp", 60))]
    guard = NaNGuard(readback="deferred", act_on="evidence")
    run = fit(Task(rectified(), sgd), data, guard, folder=tmp_path)
    assert words(guard) == [("restore",)] + [("skip",)] * (len(guard.interventions) - 1)
    assert guard.interventions[0].batch_idx == 8
    assert {found.batch_idx for found in guard.interventions[1:]} == set(range(11, 30))
    assert guard.lr_multiplier == 1.0
    assert max(float(weight.abs().max()) for weight in state_of(run)["state_dict"].values()) < 10.0


@pytest.mark.usefixtures("late")
def test_a_corrupt_batch_is_not_kept_as_a_healthy_one(tmp_path: Path) -> None:
    """Batches that come soon after one that was skipped are compared with healthy ones, not with it."""
    bad = [8, 12, 15]
    data = [(x * 1e3, y) if index in bad else (x, y) for index, (x, y) in enumerate(data_for("mlp", 40))]
    guard = NaNGuard(readback="deferred", act_on="evidence")
    fit(Task(rectified(), sgd), data, guard, folder=tmp_path)
    assert words(guard) == [("restore",), ("skip",), ("skip",)]
    assert [found.batch_idx for found in guard.interventions] == bad


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize(
    ("kind", "value", "make", "window"),
    [
        ("gradient", math.nan, plain, 1),
        ("flash", 1e6, fused, 1),
        ("target", 1e6, fused, 1),
        ("input", 1e6, plain, 4),
        ("input", 1e6, fused, 4),
        ("input", 1e6, plain, 16),
    ],
)
def test_a_bad_batch_while_the_rate_rises(
    kind: str, value: float, make: Callable[..., Any], window: int, tmp_path: Path
) -> None:
    """The weights were sound before the update that had to be undone, so that the rate, which was rising, is not
    blamed; also where the fault does not come again, or lies in another batch of the window."""
    guard = NaNGuard(snapshot_every_n_steps=20, readback="deferred", act_on="evidence")
    warm = functools.partial(optim.lr_scheduler.LinearLR, start_factor=0.01, total_iters=60)
    fault = FaultAt(kind, value, 38 * window + window // 4)
    data = data_for("mlp", 80 * window)
    fit(Task(rectified(), make, warm), data, guard, folder=tmp_path, callbacks=[fault], accumulate_grad_batches=window)
    # The loss is bad through an attribute of the module, which a step made again begins with, too.
    assert words(guard) == [("restore",) if kind == "flash" else ("restore", "redo")]
    assert guard.lr_multiplier == 1.0


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("make", [fused, plain], ids=["fused", "plain"])
@pytest.mark.parametrize("bad", [[0], [0, 1], [0, 1, 2]], ids=str)
def test_the_first_batches_are_bad(bad: list[int], make: Callable[..., Any], tmp_path: Path) -> None:
    """Before anything was proven good the run goes back to what the fit began with, and goes on."""
    data = [with_nan(batch) if index in bad else batch for index, batch in enumerate(data_for("norm", 60))]
    guard = NaNGuard(snapshot_every_n_steps=4, readback="deferred")
    run = fit(task("norm", make), data, guard, folder=tmp_path)
    assert non_finite(state_of(run)["state_dict"]) == []
    assert set(words(guard)) <= {("skip",), ("restore",)}
    assert guard.interventions[0].snapshot_step in (None, 0)


@pytest.mark.usefixtures("late")
def test_bad_windows_that_keep_coming(tmp_path: Path) -> None:
    """So it is where an update is made of several batches: the batch shown for a late fault is one of its window."""
    bad = list(range(42, 400, 40))
    guard = NaNGuard(snapshot_every_n_steps=2, readback="deferred", thresholds=KEEPS_NO_WINDOW)
    data = [with_nan(batch) if index in bad else batch for index, batch in enumerate(data_for("norm", 400))]
    run = fit(task("norm", plain), data, guard, folder=tmp_path, accumulate_grad_batches=4)
    assert words(guard) == [("restore",)] + [("skip",)] * (len(bad) - 1)
    assert [i.cause for i in guard.interventions] == ["non_finite_input"] * len(bad)
    assert non_finite(state_of(run)["state_dict"]) == []


@pytest.mark.usefixtures("late")
def test_bad_losses_of_one_optimizer_that_keep_coming(tmp_path: Path) -> None:
    """Under manual optimization, where no batch can be run again to tell, one rollback is enough: bad losses are no
    reason to slow the learner down."""
    bad = list(range(10, 200, 10))
    guard = NaNGuard(snapshot_every_n_steps=2, readback="deferred")
    fault = FaultAt("loss", math.nan, bad)
    run = fit(TwoOptimizers(), batches(count=200), guard, folder=tmp_path, callbacks=[fault])
    assert words(guard) == [("restore",)] + [("skip",)] * 2 * (len(bad) - 1)  # each bad batch skips two optimizers
    assert guard.lr_multiplier == 1.0
    assert non_finite(state_of(run)["state_dict"]) == []


@pytest.mark.usefixtures("late")
def test_a_late_healthy_run_is_the_same(tmp_path: Path) -> None:
    """Deciding on the device changes no bit of a healthy run."""
    ended = []
    for guard in (None, NaNGuard(snapshot_every_n_steps=3, readback="deferred")):
        run = fit(task("norm", fused, metric=True), data_for("norm", 30), guard, folder=tmp_path)
        ended.append(state_of(run))
    assert differences(*ended) == []


@pytest.mark.parametrize("by_hand", [False, True], ids=["window", "manual optimization"])
def test_losses_of_a_window_are_copied(by_hand: bool, tmp_path: Path) -> None:
    """A captured graph writes each loss to the same place: those of a window are kept as they were, and those of an
    update that is made by hand of several backwards."""

    class Plain(Task):
        def __init__(self, net: nn.Module) -> None:
            super().__init__(net)
            self.automatic_optimization = not by_hand

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if not by_hand:
                return self.shown(super().training_step(batch, batch_idx))
            optimizer = self.optimizers()
            optimizer.zero_grad()
            for index in range(4):
                self.manual_backward(self.shown((index + 1) * self.loss(batch, f"loss {index}")))
            optimizer.step()
            return None

        def shown(self, loss: Tensor) -> Tensor:
            return loss

    class SamePlace(Plain):
        def shown(self, loss: Tensor) -> Tensor:
            self.place = getattr(self, "place", torch.zeros(()))
            return _InPlace.apply(loss, self.place)

    seen: list[float | None] = []
    guard = NaNGuard(readback="deferred")
    accept = PendingReading.read

    def read(self: PendingReading, *args: Any) -> Any:
        reading = accept(self, *args)
        seen.append(reading.loss)
        return reading

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PendingReading, "read", read)
        options = {} if by_hand else {"accumulate_grad_batches": 4}
        for kind in (Plain, SamePlace):
            torch.manual_seed(0)
            fit(kind(mlp()), batches(count=2 if by_hand else 8), guard, folder=tmp_path, **options)
    assert seen[:2] == pytest.approx(seen[2:])


class _InPlace(torch.autograd.Function):
    """Puts a value into a given place."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, place: Tensor) -> Tensor:
        place.copy_(value)
        return place.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None


@pytest.mark.parametrize("model", ["mlp", "manual"])
def test_an_update_that_a_gradscaler_has_skipped_is_not_undone(model: str, tmp_path: Path) -> None:
    """The bad update did not reach the weights, so the run is the one without a guard, and the record says skip."""
    data = batches(count=12)
    data[8] = with_nan(data[8])

    def run(guard: NaNGuard | None) -> Any:
        made = fit(task(model), data, guard, folder=tmp_path, precision="16-mixed", max_epochs=1)
        return learner_of(made.trainer, made.module)

    guard = NaNGuard(dirpath=tmp_path, readback="deferred", snapshot_every_n_steps=64)
    assert differences(run(guard), run(None)) == []
    assert {remedy for record in guard.interventions for remedy in record.remedies} == {"skip"}
    assert all(record.updates_lost == 0 for record in guard.interventions)

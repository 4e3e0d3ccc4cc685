"""A resumed run goes on as if it had not stopped; the guard's state is plain, and one guard may serve several fits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import LearningRateMonitor
from torch.utils.data import DataLoader

from lightning_nanguard import (
    Budget,
    ClipGradients,
    DivergingLoss,
    GradientSpike,
    NaNGuard,
    NonFinite,
    ReduceLR,
    Rollback,
    TrainingDivergedError,
)
from tests.checkpoints.training import EPOCHS, PER_EPOCH, cosine_task, guard_with, train
from tests.helpers import (
    ONCE,
    Task,
    batches,
    copied,
    differences,
    fit,
    learner_of,
    state_of,
    task,
    trainer_for,
    with_bad,
    with_nan,
    words,
)
from tests.modules import Diverge, NaNWeight, SaveAt

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.usefixtures("own_folder"),
]


class BadSteps(Callback):
    """Makes the loss of some updates NaN, told by ``global_step`` so that a resumed run counts on."""

    def __init__(self, *steps: int) -> None:
        self.steps = set(steps)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        pl_module.loss_factor = math.nan if trainer.global_step in self.steps else None

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        pl_module.loss_factor = None


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[NaNGuard, Path]:
    """A guard that has cut the rate and turned clipping on, and the checkpoint its run was stopped with."""
    folder = tmp_path_factory.mktemp("stopped")
    guard, path = guard_with(), folder / "mid.ckpt"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(guard, Diverge(7, 10), SaveAt(16, path, stop=True))
    return guard, path


def guard_state(path: Path) -> dict[str, Any]:
    content = torch.load(path, weights_only=True)
    (state,) = (value for key, value in content["callbacks"].items() if "NaNGuard" in key)
    return state


# ---------------------------------------------------------------------------------------------------- resuming


def test_resumed_run_equals_one_not_stopped(tmp_path: Path) -> None:
    """After a cut and clipping, a run that is stopped and resumed ends with the bits of one that is not stopped: the
    learner and the rates used and shown, wherever in an epoch it stopped, and the guard's windows, counts and clipping.
    """
    stops = [12, 13, 16, PER_EPOCH, 2 * PER_EPOCH, 29]
    faults, last = (7, 10), PER_EPOCH * EPOCHS
    whole = guard_with()
    saves = [SaveAt(step, tmp_path / f"{step}.ckpt") for step in (*stops, last)]
    trainer, module, rates, logger = train(whole, Diverge(*faults), *saves)
    assert whole.lr_multiplier < 1.0, list(whole.interventions)
    shown = [row["lr-AdamW"] for _, row in logger.rows if "lr-AdamW" in row]
    for stop_at in stops:
        again, end = guard_with(), tmp_path / f"end of {stop_at}.ckpt"
        resume = tmp_path / f"{stop_at}.ckpt"
        trainer2, module2, rates2, logger2 = train(again, Diverge(*faults), SaveAt(last, end), resume=resume)
        assert again.lr_multiplier == whole.lr_multiplier
        assert rates2 == rates[-len(rates2) :]
        shown2 = [row["lr-AdamW"] for _, row in logger2.rows if "lr-AdamW" in row]
        assert shown2 == shown[-len(shown2) :]
        assert trainer2.global_step == trainer.global_step == last
        assert differences(learner_of(trainer, module), learner_of(trainer2, module2)) == []
        assert differences(guard_state(tmp_path / f"{last}.ckpt")["guard"], guard_state(end)["guard"]) == []


@pytest.mark.parametrize("options", [{}, {"readback": "deferred"}, {"act_on": "evidence"}], ids=str)
def test_interventions_after_resuming(options: dict[str, Any], tmp_path: Path) -> None:
    """Whatever the guard had counted and learned before the stop, it goes on to decide as it would have."""
    faults, last = (2, 3, 7, 10, 11, 19, 23, 24, 31, 40), PER_EPOCH * EPOCHS
    whole = guard_with(**options)
    saves = [SaveAt(step, tmp_path / f"{step}.ckpt") for step in (9, 12, 25, last)]
    train(whole, BadSteps(*faults), *saves)
    expected = guard_state(tmp_path / f"{last}.ckpt")["guard"]
    for stop_at in (9, 12, 25):
        again, end = guard_with(**options), tmp_path / f"end of {stop_at}.ckpt"
        train(again, BadSteps(*faults), SaveAt(last, end), resume=tmp_path / f"{stop_at}.ckpt")
        after = [one for one in whole.interventions if one.global_step > stop_at]
        assert [(one.global_step, one.fault, one.remedies, one.cause) for one in again.interventions] == [
            (one.global_step, one.fault, one.remedies, one.cause) for one in after
        ]
        assert differences(expected, guard_state(end)["guard"]) == []


NEW_KEYS = ("rates", "never_late", "blamed_batches", "tried", "plausibility", "snapshots")


def test_a_checkpoint_of_the_version_before_is_resumed(stopped: tuple[NaNGuard, Path], tmp_path: Path) -> None:
    """What it does not hold starts anew."""
    content = torch.load(stopped[1], weights_only=True)
    (state,) = (value["guard"] for key, value in content["callbacks"].items() if "NaNGuard" in key)
    for name in NEW_KEYS:
        del state[name]
    for stream in state["streams"].values():
        del stream["taken"], stream["limits"]
    torch.save(content, tmp_path / "old.ckpt")
    again = guard_with()
    trainer, _, _, _ = train(again, resume=tmp_path / "old.ckpt")
    assert trainer.global_step == PER_EPOCH * EPOCHS
    assert again.lr_multiplier == stopped[0].lr_multiplier
    assert list(again.interventions) == []


def test_later_skip_after_resuming(tmp_path: Path) -> None:
    """A bad batch after resuming is judged as it would have been: it is skipped, and the runs stay the same."""
    path = tmp_path / "mid.ckpt"
    whole = guard_with()
    trainer, module, _, _ = train(whole, BadSteps(30), SaveAt(26, path))
    again = guard_with()
    trainer2, module2, _, _ = train(again, BadSteps(30), resume=path)
    assert words(whole) == words(again) == [("skip",)]
    assert differences(learner_of(trainer, module), learner_of(trainer2, module2)) == []


def test_lost_weight_right_after_resuming(tmp_path: Path) -> None:
    """A weight lost in the first steps after resuming comes back from the state that was loaded."""
    path = tmp_path / "mid.ckpt"
    train(guard_with(), SaveAt(16, path, stop=True))
    again = guard_with()
    train(again, NaNWeight(1), resume=path)
    assert words(again) == [("restore",)]
    assert again.interventions[0].snapshot_step == 16


def test_counts_go_on(tmp_path: Path) -> None:
    """The number of interventions that loggers are told goes on counting after resuming."""
    path = tmp_path / "mid.ckpt"
    train(guard_with(), Diverge(7, 10), SaveAt(20, path))
    _, _, _, logger = train(guard_with(), BadSteps(30), resume=path)
    told = [row["nanguard/interventions"] for _, row in logger.rows if "nanguard/interventions" in row]
    assert told == [3.0]


def test_budget_goes_on(tmp_path: Path) -> None:
    """Rollbacks before the stop count against the budget after it."""
    path = tmp_path / "mid.ckpt"
    budget = Budget(max_rollbacks=2)
    train(guard_with(budget=budget), NaNWeight([7, 10]), SaveAt(20, path, stop=True))
    with pytest.raises(TrainingDivergedError, match="the budget is used up"):
        train(guard_with(budget=budget), NaNWeight([4]), resume=path)


def test_clipping_goes_on(tmp_path: Path) -> None:
    """Clipping that was turned on is on, at the same value, in the first step after resuming."""
    path = tmp_path / "mid.ckpt"
    seen: list[tuple[int, float | None]] = []

    class Look(Callback):
        def __init__(self, guard: NaNGuard) -> None:
            self.guard = guard

        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            seen.append((trainer.global_step, self.guard.clip_val))

    first, second = guard_with(), guard_with()
    train(first, Look(first), Diverge(7), SaveAt(16, path, stop=True))
    before = seen[-1][1]
    assert before is not None
    seen.clear()
    train(second, Look(second), resume=path)
    assert seen[0] == (17, before)


@pytest.mark.parametrize(
    "detectors",
    [[NonFinite()], [GradientSpike(window=30), NonFinite()], [DivergingLoss(patience=10)], []],
    ids=["fewer", "another window and order", "another patience", "none"],
)
def test_changed_detectors(detectors: list[Any], stopped: tuple[NaNGuard, Path]) -> None:
    """A run may be resumed with other detectors."""
    trainer, *_ = train(guard_with(detectors=detectors), resume=stopped[1])
    assert trainer.global_step == PER_EPOCH * EPOCHS


def test_changed_remedies(stopped: tuple[NaNGuard, Path]) -> None:
    """A run may be resumed with other remedies; what was cut stays cut."""
    before, path = stopped
    after = guard_with(remedies=[Rollback(), ReduceLR(factor=0.1), ClipGradients(1.0)])
    train(after, resume=path)
    assert after.lr_multiplier == before.lr_multiplier < 1.0


def test_checkpoint_without_a_guard(tmp_path: Path) -> None:
    """A checkpoint of a run without the guard is resumed with one."""
    path = tmp_path / "bare.ckpt"
    train(None, SaveAt(16, path, stop=True))
    guard = guard_with()
    trainer, *_ = train(guard, resume=path)
    assert trainer.global_step == PER_EPOCH * EPOCHS
    assert list(guard.interventions) == []


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint")
def test_guards_checkpoint_without_the_guard(stopped: tuple[NaNGuard, Path]) -> None:
    """A checkpoint written beside the guard resumes without it, at the schedule's own rate."""
    guard, path = stopped
    assert guard.lr_multiplier < 1.0
    trainer, _, rates, _ = train(None, resume=path)
    assert trainer.global_step == PER_EPOCH * EPOCHS
    assert rates[0] == pytest.approx(0.005 * (1 + math.cos(math.pi * 16 / (PER_EPOCH * EPOCHS))))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint")
def test_an_observing_guard_applies_nothing_of_the_checkpoint(stopped: tuple[NaNGuard, Path]) -> None:
    """Rates and weights are those of a run without the guard, and so is every rate that the guard shows; the multiplier
    and the clipping stay in later checkpoints, for a guard that acts."""
    before, path = stopped
    later = path.with_name("of an observing guard.ckpt")
    bare = train(None, last := BadSteps(PER_EPOCH * EPOCHS - 1), resume=path)
    observed = train(after := guard_with(observe=True), last, SaveAt(24, later), resume=path)
    assert observed[2] == bare[2]
    logged = {step: row["nanguard/lr"] for step, row in observed[3].rows if "nanguard/lr" in row}
    assert list(logged.values()) == pytest.approx(bare[2])
    seen = after.interventions[0]
    assert (seen.fault, seen.lr_before, seen.lr_after) == ("non_finite_loss", bare[2][-1], bare[2][-1])
    assert (after.lr_multiplier, "the learning rate ends" in after.summary()) == (1.0, False)
    assert differences(dict(observed[1].state_dict()), dict(bare[1].state_dict())) == []
    assert after.state_dict()["guard"]["rate"]["multiplier"] == before.lr_multiplier
    train(acting := guard_with(), resume=later)
    assert acting.lr_multiplier == before.lr_multiplier < 1.0
    assert acting.state_dict()["guard"]["clipper"] == before.state_dict()["guard"]["clipper"]


# ---------------------------------------------------------------------------------------------------- the file


def plain(value: Any) -> list[str]:
    """Types in a nested state that a weights-only load does not take."""
    if type(value) is dict:
        return [t for k, v in value.items() for t in (*plain(k), *plain(v))]
    if type(value) in (list, tuple, set):
        return [t for v in value for t in plain(v)]
    allowed = (str, int, float, bool, type(None), torch.Tensor)
    return [] if type(value) in allowed else [type(value).__qualname__]


def test_plain_containers(tmp_path: Path) -> None:
    """The guard's state is made of plain containers, numbers and strings, whatever has happened."""
    path = tmp_path / "mid.ckpt"
    guard = guard_with()
    train(guard, Diverge(7, 10), NaNWeight(14), SaveAt(20, path, stop=True))
    state = guard_state(path)
    assert plain(state) == []
    assert plain(guard.state_dict()) == []
    assert state["guard"]["rate"]["multiplier"] == guard.lr_multiplier


def test_healthy_checkpoint_is_small(tmp_path: Path) -> None:
    """The guard adds histories, not copies of the weights."""
    path = tmp_path / "mid.ckpt"
    train(guard_with(), SaveAt(40, path, stop=True))

    def tensors(value: Any) -> int:
        if isinstance(value, dict):
            return sum(map(tensors, value.values()))
        if isinstance(value, (list, tuple)):
            return sum(map(tensors, value))
        return int(isinstance(value, torch.Tensor))

    assert tensors(guard_state(path)) == 0


def test_state_before_a_fit() -> None:
    """A guard that has seen nothing has a state that can be given back to it."""
    guard = NaNGuard()
    guard.load_state_dict(guard.state_dict())
    fit(task(), batches(), guard)
    assert list(guard.interventions) == []


def test_saved_after_the_fit(tmp_path: Path) -> None:
    """A checkpoint saved once fit has ended resumes like one saved during it."""
    guard = guard_with()
    trainer, *_ = train(guard, Diverge(7, 10), epochs=2)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    again = guard_with()
    _, _, rates, _ = train(again, resume=tmp_path / "after.ckpt")
    assert again.lr_multiplier == guard.lr_multiplier < 1.0
    assert len(rates) == 2 * PER_EPOCH


# ---------------------------------------------------------------------------------------------------- reuse


def test_two_fits_with_one_guard() -> None:
    """A second fit of another module with the same guard starts anew, as with a new guard."""
    used = NaNGuard(thresholds=ONCE, snapshot_every_n_steps=3)
    fit(cosine_task(), batches(count=24), used, callbacks=[Diverge(7, 10)])
    assert used.lr_multiplier < 1.0
    first = len(used.interventions)
    second = fit(cosine_task(), batches(count=24), used)
    fresh = fit(cosine_task(), batches(count=24), NaNGuard(thresholds=ONCE, snapshot_every_n_steps=3))
    assert used.lr_multiplier == 1.0
    assert len(used.interventions) == first
    assert differences(state_of(second), state_of(fresh)) == []


def test_a_fit_after_one_that_was_stopped() -> None:
    """A guard and a monitor whose run ended in an error serve another fit, as new ones would."""
    used = NaNGuard(thresholds=ONCE, snapshot_every_n_steps=3, budget=Budget(max_rollbacks=2))
    monitor = LearningRateMonitor("step")
    data = batches(count=24)
    with pytest.raises(TrainingDivergedError, match="the budget is used up"):
        fit(task(), data, used, callbacks=[Diverge(7, 10, 13), monitor])
    assert used.lr_multiplier < 1.0
    second = fit(task(), data, used, callbacks=[monitor])
    fresh = fit(task(), data, NaNGuard(), callbacks=[LearningRateMonitor("step")])
    assert used.lr_multiplier == 1.0
    assert differences(state_of(second), state_of(fresh)) == []


def test_fit_again_with_the_same_trainer() -> None:
    """A trainer that goes on with more epochs is guarded in them."""
    guard = guard_with()
    run = fit(task(), batches(count=12), guard)
    data = with_bad(5, count=12)
    run.trainer.fit_loop.max_epochs = 2
    run.trainer.fit(run.module, DataLoader(data, batch_size=None), DataLoader(data, batch_size=None))
    assert words(guard) == [("skip",)]
    assert run.trainer.global_step == 24
    assert run.trainer.callbacks.count(guard) == 1


def test_two_trainers() -> None:
    """Two guards in two trainers know nothing of each other."""
    one, other = NaNGuard(), NaNGuard()
    data = batches(count=12)
    fit(task(), [*data[:5], with_nan(data[5]), *data[6:]], one)
    fit(task(), data, other)
    assert words(one) == [("skip",)]
    assert list(other.interventions) == []


def test_detectors_given_to_two_guards() -> None:
    """Detectors and remedies that two guards share keep no history between them."""
    shared = [NonFinite(), GradientSpike(), DivergingLoss()]
    remedies = [Rollback(), ReduceLR()]
    first = NaNGuard(detectors=shared, remedies=remedies, snapshot_every_n_steps=3)
    fit(task(), batches(count=30), first, callbacks=[Diverge(7, 10)])
    assert all(detector.state_dict() == type(detector)().state_dict() for detector in shared)


@pytest.mark.parametrize("entry", ["validate", "test", "predict"])
def test_nothing_outside_fit(entry: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Validating, testing and predicting go on as without the guard, NaN or not."""

    class Whole(Task):
        def test_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch, "test_loss")

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.net(batch[0])

    data = with_bad(1, count=3)
    guard = NaNGuard()
    module = Whole(task().net)
    before = copied(dict(module.named_parameters()))
    trainer = trainer_for(tmp_path, guard)
    getattr(trainer, entry)(module, DataLoader(data, batch_size=None), verbose=False) if entry != "predict" else (
        trainer.predict(module, DataLoader(data, batch_size=None))
    )
    assert list(guard.interventions) == []
    assert differences(before, dict(module.named_parameters())) == []
    assert list(tmp_path.rglob("*nanguard*")) == []
    assert "NaNGuard" not in caplog.text
    # And a fit afterwards is guarded.
    fit(task(), data, guard)
    assert words(guard) == [("skip",)]


# ------------------------------------------------------------------------------------------- two detectors of a class


def test_detectors_of_one_class_keep_their_own_histories(tmp_path: Path) -> None:
    """Two detectors of one class with other windows each take up the history they had, in whatever place they are."""
    path = tmp_path / "mid.ckpt"
    both = [GradientSpike(window=20), GradientSpike(window=30)]
    train(guard_with(detectors=both), SaveAt(40, path, stop=True))
    saved = guard_state(path)["guard"]["streams"]["0"]["detectors"]
    assert [len(state["norms"]) for _, state in saved] == [20, 30]
    for detectors in (both, [NonFinite(), *both]):
        again = tmp_path / f"again {len(detectors)}.ckpt"
        train(guard_with(detectors=detectors), SaveAt(41, again, stop=True), resume=path)
        resumed = guard_state(again)["guard"]["streams"]["0"]["detectors"][-2:]
        assert [len(state["norms"]) for _, state in resumed] == [20, 30]

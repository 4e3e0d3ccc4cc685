"""The closure of automatic optimization, in Lightning's place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pytorch_lightning import Callback, Trainer
from torch import nn
from torch.optim import Optimizer

from lightning_nanguard import NaNGuard
from lightning_nanguard.trainer.private.callbacks import IsGuard
from lightning_nanguard.trainer.private.closures import (
    MicroBatchRun,
    accumulates,
    accumulating,
    call_after_backward,
    changes_gradients,
    end_backward,
    logging_for,
    result_of,
    run_micro_batches_by,
    skipped_steps_raise_nothing,
    uncounted,
)
from tests.helpers import Batch, Task, TwoOptimizers, batches, differences, fit, mlp, state_of, task, with_bad, words


class Runner:
    """Passes everything on, or runs each micro-batch twice."""

    def __init__(self, trainer: Any = None, *, twice: bool = False, is_guard: IsGuard | None = None) -> None:
        self.trainer, self.twice, self.is_guard = trainer, twice, is_guard
        self.seen: list[tuple[MicroBatchRun, bool]] = []
        self.forwards = 0

    def run(self, run: MicroBatchRun) -> Any:
        self.seen.append((run, accumulates(self.trainer)))
        result = run.whole()
        if self.twice:
            gradients = [parameter.grad for parameter in self.trainer.lightning_module.parameters()]
            with uncounted(self.trainer, self.is_guard):
                run.whole()
            for parameter, gradient in zip(self.trainer.lightning_module.parameters(), gradients, strict=True):
                parameter.grad = gradient
        return result

    def forward(self, forward: Callable[[], Any]) -> Any:
        self.forwards += 1
        return forward()


class Installs(Callback):
    """Has a runner run the micro-batches of a fit, and calls hooks of its own down."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.calls: list[str] = []
        self.undo: Callable[[], None]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.runner.trainer = trainer
        self.undo = run_micro_batches_by(trainer, self.runner.run, self.runner.forward)

    def on_before_zero_grad(self, *args: Any) -> None:
        self.calls.append("zero_grad")

    def on_before_backward(self, *args: Any) -> None:
        self.calls.append("backward")

    def on_after_backward(self, *args: Any) -> None:
        self.calls.append("after")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.undo()
        assert "_make_closure" not in vars(trainer.fit_loop.epoch_loop.automatic_optimization)


def test_every_micro_batch_is_run_by_the_runner(tmp_path: Path) -> None:
    """It is told batch, index and place in the window, and a runner that passes on changes nothing."""
    runner, data = Runner(), batches(count=5)
    options: dict[str, Any] = {"folder": tmp_path, "accumulate_grad_batches": 2, "max_epochs": 2}
    run = fit(task(metric=True), data, callbacks=[Installs(runner)], **options)
    assert [one.batch_idx for one, _ in runner.seen] == [*range(5)] * 2
    assert [one.zero_grad is not None for one, _ in runner.seen] == [True, False, True, False, True] * 2
    assert [waits for _, waits in runner.seen] == [True, False, True, False, False] * 2
    assert all(one.repeatable and one.batch[0].equal(data[one.batch_idx][0]) for one, _ in runner.seen)
    assert runner.forwards == 10
    assert differences(state_of(run), state_of(fit(task(metric=True), data, **options))) == []


def test_what_is_not_counted(tmp_path: Path) -> None:
    """A repeated run calls no callback but the guard, and makes no progress in Lightning's counts."""
    progress, calls = [], []
    for twice in (False, True):
        runner = Runner(twice=twice, is_guard=None)
        installs = Installs(runner)
        run = fit(task(), batches(count=3), callbacks=[installs], folder=tmp_path)
        loop = run.trainer.fit_loop.epoch_loop.automatic_optimization
        progress.append(loop.optim_progress.state_dict())
        calls.append(installs.calls)
        assert runner.forwards == 3 * (1 + twice)
        assert installs in run.trainer.callbacks
    assert progress[0] == progress[1]
    assert calls[0] == calls[1] == ["zero_grad", "backward", "after"] * 3
    guard = Installs(Runner(twice=True, is_guard=lambda callback: isinstance(callback, Installs)))
    fit(task(), batches(count=1), callbacks=[guard], folder=tmp_path)
    assert len(guard.calls) == 6


class Logs(Task):
    """Logs without saying how many samples its batch has."""

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        loss = (self.net(batch[0]) - batch[1]).square().mean()
        self.log("mean", float(batch_idx), on_epoch=True)
        return loss


def test_the_batch_size_of_what_is_logged(tmp_path: Path) -> None:
    """``self.log`` counts the samples of the batch that is run, not of the one at hand."""
    data = [*batches(count=1, size=2), *batches(count=1, size=6)]
    seen = []

    class Again(Installs):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            results = trainer.fit_loop.epoch_loop._results
            with logging_for(trainer, data[0]):
                assert results.batch is data[0]
                assert results.batch_size is None
            seen.append(results.batch is batch)

    run = fit(Logs(mlp()), data, callbacks=[Again(Runner())], folder=tmp_path)
    assert seen == [True, True]
    assert float(run.trainer.callback_metrics["mean_epoch" if "mean_epoch" in run.trainer.callback_metrics else "mean"])


def test_a_loss_becomes_a_result(tmp_path: Path) -> None:
    """Divided by the length of the window, with a graph to go back through and a loss for the hooks."""

    class Asks(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            weight = next(pl_module.parameters())
            result = result_of(trainer, weight.sum() * 0 + 6.0)
            assert float(result.loss) == 3.0
            assert result.closure_loss.requires_grad
            assert result.asdict()["loss"] is result.loss

    fit(task(), batches(count=2), callbacks=[Asks()], folder=tmp_path, accumulate_grad_batches=2)


def test_after_backward_is_called_for_those_that_did_not_hear_of_it(tmp_path: Path) -> None:
    """A backward pass that raised and was made again is over for them once."""
    installs = Installs(Runner())
    run = fit(task(), batches(count=1), callbacks=[installs], folder=tmp_path)
    installs.calls.clear()
    call_after_backward(run.trainer, lambda callback: callback is installs)
    assert installs.calls == []
    call_after_backward(run.trainer, lambda callback: False)
    assert installs.calls == ["after"]


def test_who_changes_gradients_after_backward(tmp_path: Path) -> None:
    """The user's ``optimizer_step`` may, and so may a plugin that is not Lightning's."""

    class Steps(Task):
        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)

    answers = []
    for module in (Task(mlp()), Steps(mlp())):
        run = fit(module, batches(count=1), folder=tmp_path)
        answers.append(changes_gradients(run.trainer, module))
    assert answers == [False, True]


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
@pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument")
def test_a_step_that_takes_its_batches_itself_cannot_be_given_one_again(tmp_path: Path) -> None:
    """It would take the next one."""

    class Takes(Task):
        def training_step(self, dataloader_iter: Any) -> Any:
            batch, _, _ = next(dataloader_iter)
            return (self.net(batch[0]) - batch[1]).square().mean()

    runner = Runner()
    fit(Takes(mlp()), batches(count=2), callbacks=[Installs(runner)], folder=tmp_path)
    assert [one.repeatable for one, _ in runner.seen] == [False, False]
    assert isinstance(runner.seen[0][0].optimizer, Optimizer)


def test_what_follows_the_backward_pass(tmp_path: Path) -> None:
    """The hooks before the optimizer's step are called, and gradients are clipped as the Trainer was told."""

    class Ends(Callback):
        steps = 0
        norms: ClassVar[list[float]] = []

        def on_before_optimizer_step(self, *args: Any) -> None:
            self.steps += 1

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            for parameter in pl_module.parameters():
                parameter.grad = torch.ones_like(parameter)
            end_backward(trainer, trainer.optimizers[0])
            gradients = [parameter.grad for parameter in pl_module.parameters()]
            self.norms.append(float(torch.linalg.vector_norm(torch.cat([one.flatten() for one in gradients]))))

    ends = Ends()
    fit(task(), batches(count=2), folder=tmp_path, callbacks=[ends], gradient_clip_val=0.5)
    assert ends.steps == 4
    assert ends.norms == pytest.approx([0.5, 0.5], rel=1e-4)


def test_the_window_of_an_earlier_update() -> None:
    """Inside, a loss is divided by the number of micro-batches of that update."""
    trainer = Trainer(accumulate_grad_batches=2, logger=False, accelerator="cpu", barebones=True)
    with accumulating(trainer, 4):
        assert trainer.accumulate_grad_batches == 4
        assert float(result_of(trainer, torch.tensor(8.0)).loss) == 2.0
    assert trainer.accumulate_grad_batches == 2


class NeedsGradients(Optimizer):
    """SGD that expects a gradient of every parameter."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.05})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None if closure is None else closure()
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.sub_(parameter.grad, alpha=group["lr"])
        return loss


class RefusesToClip(Task):
    """Clips in a way that raises where a gradient is not finite."""

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0, error_if_nonfinite=True)


class Raises(Callback):
    """Raises an exception of its own before the seventh step."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == 6:
            raise ValueError("a limit of the user's")


def refusing() -> Task:
    torch.manual_seed(0)
    return RefusesToClip(mlp())


MODULES: dict[str, Callable[[], Task]] = {
    "needs gradients": lambda: task(optimizer=NeedsGradients),
    "needs gradients, manual": lambda: task("manual", optimizer=NeedsGradients),
    "refuses to clip": refusing,
}


@pytest.mark.parametrize("readback", ["step", "deferred"])
@pytest.mark.parametrize("name", MODULES)
def test_a_skipped_step_does_not_end_the_run(name: str, readback: Any, tmp_path: Path) -> None:
    """A bad batch is skipped, whatever the optimizer or clipping makes of a step without usable gradients."""
    guard = NaNGuard(readback=readback)
    run = fit(MODULES[name](), with_bad(6), guard, folder=tmp_path)
    assert run.trainer.global_step == 24 * (2 if isinstance(run.module, TwoOptimizers) else 1)
    assert all(bool(p.isfinite().all()) for p in run.module.parameters())
    assert {word for one in words(guard) for word in one} <= {"skip", "restore"}


def test_the_weights_are_those_of_a_run_without_the_batch(tmp_path: Path) -> None:
    """A step that raised half-way leaves nothing behind."""
    skipped = fit(MODULES["needs gradients"](), with_bad(6), NaNGuard(), folder=tmp_path)
    data = with_bad(6)
    without = fit(MODULES["needs gradients"](), [*data[:6], *data[7:]], folder=tmp_path)
    assert differences(dict(skipped.module.named_parameters()), dict(without.module.named_parameters())) == []


def test_other_exceptions_are_raised(tmp_path: Path) -> None:
    """What a callback raises in a skipped step is the user's, and so is what a step raises that is not skipped."""
    with pytest.raises(ValueError, match="a limit of the user's"):
        fit(task(), with_bad(6), NaNGuard(), folder=tmp_path, callbacks=[Raises()])
    with pytest.raises(RuntimeError, match="is non-finite, so it cannot be clipped"):
        fit(refusing(), with_bad(6), NaNGuard(observe=True), folder=tmp_path)


class FullDiskError(Exception):
    """An exception of the user's own."""


@pytest.mark.parametrize("error", [FullDiskError("no space left"), OSError("no space left")], ids=type)
def test_exceptions_of_a_skipped_step_with_another_cause_are_raised(error: Exception, tmp_path: Path) -> None:
    """The user gets to see what the optimizer raises if neither numbers nor missing gradients can be the cause."""

    class Writes(NeedsGradients):
        steps = 0

        def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
            if closure is not None:
                closure()
            self.steps += 1
            if self.steps == 7:
                raise error

    with pytest.raises(type(error), match="no space left"):
        fit(task(optimizer=Writes), with_bad(6), NaNGuard(), folder=tmp_path)


def test_nothing_is_left_on_the_trainer(tmp_path: Path) -> None:
    """The function that is returned undoes everything, and a healthy run is the same."""
    bare, run = (fit(task(), batches(), guard, folder=tmp_path) for guard in (None, NaNGuard()))
    assert differences(state_of(run), state_of(bare)) == []
    strategy = run.trainer.strategy
    assert "optimizer_step" not in vars(strategy)
    skipped_steps_raise_nothing(run.trainer, lambda optimizer, error: True)()
    assert "optimizer_step" not in vars(strategy)

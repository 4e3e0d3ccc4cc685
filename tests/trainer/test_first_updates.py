"""What the first updates of a fit show: mistakes are named, and what is meant is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.diagnose.silent import MEANT, MISTAKES, named, said
from lightning_nanguard import Advice, NaNGuard
from lightning_nanguard.record.files import read_file
from tests.helpers import OUTPUTS, TwoOptimizers, batches, fit, mlp, task


class Task(pl.LightningModule):
    """A regression."""

    early = False

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 1e-3)


pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("cause", MISTAKES)
def test_a_mistake_is_named(cause: str) -> None:
    """One form of each mistake: its cause is the only advice."""
    assert named(said(MISTAKES[cause][0], 1)) == {cause}


@pytest.mark.parametrize("make", MEANT, ids=[make.__name__ for make in MEANT])
def test_what_is_meant_is_left_alone(make: Any) -> None:
    """Nothing is said of transfer learning, adapters, targets, averages, GANs, schedules, accumulation and the like."""
    assert named(said(make, 2)) == set()


def test_advice_is_given_once_and_on_record(tmp_path: Path) -> None:
    """On the console, in the file and in ``guard.advice``; nothing is looked at afterwards."""
    guard = NaNGuard(dirpath=tmp_path)
    fit(task(optimizer=lambda p: torch.optim.SGD(p, 0.0)), batches(count=80), guard, folder=tmp_path)
    (advice,) = (one for one in guard.advice if one.occasion == "first updates")
    assert (advice.finding.cause, advice.occasion, advice.finding.place) == (
        "learning_rate_zero",
        "first updates",
        "optimizer 0",
    )
    assert advice.global_step == 64
    assert read_file(tmp_path / "advice.jsonl", Advice.from_dict) == list(guard.advice)
    assert not len(guard.interventions)


@pytest.mark.parametrize("own", [True, False], ids=["set by the user", "plain backward"])
def test_gradients_that_no_backward_pass_of_lightning_makes(own: bool, tmp_path: Path) -> None:
    """A gradient that the code of a step sets anew, or makes without Lightning, is not said to be never zeroed."""

    class ByHand(TwoOptimizers):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            for index, optimizer in enumerate(self.optimizers()):
                optimizer.zero_grad()
                loss = self.loss(batch, f"loss_{index}")
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                if own:
                    for one, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                        one.grad = gradient.clone()
                else:
                    loss.backward(inputs=parameters)
                optimizer.step()

    guard = NaNGuard(dirpath=tmp_path)
    fit(ByHand(), batches(count=40), guard, folder=tmp_path)
    assert [advice.finding.cause for advice in guard.advice] == []


def test_a_mode_that_is_switched_after_the_first_batches(tmp_path: Path) -> None:
    """A model that evaluates from the thirteenth batch on is named; one that does so in the first three is not."""

    class Evaluating(Task):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.train(batch_idx >= 3 if self.early else batch_idx < 12)

    for early, causes in ((True, []), (False, ["eval_mode"])):
        module = Evaluating(nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Linear(8, OUTPUTS)))
        module.early = early
        guard = NaNGuard(dirpath=tmp_path / str(early))
        fit(module, batches(count=70), guard, folder=tmp_path)
        assert [advice.finding.cause for advice in guard.advice] == causes


def test_a_layer_that_is_replaced_after_the_optimizer_was_made(tmp_path: Path) -> None:
    """The new layer gets gradients, and no optimizer has it."""

    class Replacing(Task):
        def on_train_start(self) -> None:
            self.net[0] = nn.Linear(6, 8)

    guard = NaNGuard(dirpath=tmp_path)
    fit(
        Replacing(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))), batches(count=70), guard, folder=tmp_path
    )
    (advice,) = guard.advice
    assert (advice.finding.cause, advice.finding.place) == ("parameter_not_in_optimizer", "net.0")


def test_batches_that_are_written_over_each_other(tmp_path: Path) -> None:
    """Batches are compared when they come: a loader that fills the same memory again has not repeated itself."""
    buffer = torch.zeros(8, 4)

    def over(rows: list[Any]) -> Any:
        return buffer.copy_(torch.stack([x for x, _ in rows])), torch.stack([y for _, y in rows])

    x, y = torch.randn(640, 4), torch.randn(640, 1)
    same, other = TensorDataset(x[:1].expand(640, 4), y[:1].expand(640, 1)), TensorDataset(x, y)
    for data, collate, causes in ((same, None, {"data_repeats"}), (other, None, set()), (other, over, set())):
        guard = NaNGuard(dirpath=tmp_path)
        fit(Task(nn.Linear(4, 1)), DataLoader(data, 8, collate_fn=collate), guard, folder=tmp_path)
        assert named(guard) == causes


def test_batches_that_differ_in_few_numbers(tmp_path: Path) -> None:
    """Images with a blank border, or one-hot rows, are different batches as soon as one number differs."""
    images = torch.zeros(640, 64)
    images[:, 27:37] = torch.rand(640, 10)
    once = torch.eye(640)
    for data in (images, once):
        guard = NaNGuard(dirpath=tmp_path)
        net = nn.Linear(data.shape[1], 1)
        fit(Task(net), DataLoader(TensorDataset(data, torch.ones(640, 1)), 32), guard, folder=tmp_path)
        assert named(guard) == set()


def test_groups_without_a_rate(tmp_path: Path) -> None:
    """An optimizer whose groups have no ``lr`` trains under the guard as it does without."""

    class Rateless(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {})

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            loss = closure()
            for group in self.param_groups:
                for one in group["params"]:
                    one.add_(one.grad, alpha=-0.01)
            return loss

    ends = []
    for guard in (None, NaNGuard(dirpath=tmp_path)):
        run = fit(task("mlp", Rateless), batches(count=9), guard, folder=tmp_path)
        ends.append([one.tolist() for one in run.module.parameters()])
    assert ends[0] == ends[1]


def test_images_with_a_black_border_do_not_repeat(tmp_path: Path) -> None:
    """All corners are the same, and so is the target, one number that is expanded."""

    def collate(rows: list[torch.Tensor]) -> Any:
        return nn.functional.pad(torch.stack(rows), (2, 2, 2, 2)), torch.ones(1, 1).expand(len(rows), 1)

    guard, loader = NaNGuard(dirpath=tmp_path), DataLoader(list(torch.rand(640, 4, 4)), 32, collate_fn=collate)
    fit(Task(nn.Sequential(nn.Flatten(), nn.Linear(64, 1))), loader, guard, folder=tmp_path)
    assert named(guard) == set()


class StepsInBackward(Task):
    """Each parameter is stepped as soon as its gradient is there; the optimizer of Lightning does nothing."""

    def configure_optimizers(self) -> Any:
        self.__dict__["own"] = {p: torch.optim.SGD([p], 0.02) for p in self.parameters()}

        def step(p: torch.Tensor) -> None:
            self.own[p].step()
            self.own[p].zero_grad()

        for p in self.parameters():
            p.register_post_accumulate_grad_hook(step)
        return torch.optim.SGD(self.parameters(), 0.0)


def test_steps_within_the_backward_pass(tmp_path: Path) -> None:
    """No gradient and no rate is seen, but the weights learn, so no mistake is named."""
    guard, net = NaNGuard(), mlp()
    fit(StepsInBackward(net), batches(count=70), guard, folder=tmp_path)
    assert guard.interventions == []
    assert guard.advice == ()

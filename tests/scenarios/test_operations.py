"""What a healthy step costs in operations: on a device each is a launch, which a fast step has little time for."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn, optim
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from benchmarks.overhead.models import GPT, Classifier, resnet
from lightning_nanguard import NaNGuard
from lightning_nanguard.guard import meter
from lightning_nanguard.guard.step_check import StepCheck
from lightning_nanguard.measure import norms
from lightning_nanguard.measure.tensors import dense_gradients
from tests.helpers import same_bits

HOOKS = ("on_train_batch_start", "on_before_backward", "on_before_optimizer_step", "on_train_batch_end")


def gpt2() -> LightningModule:
    """The shape of GPT-2 124M with tensors of next to no size."""
    return Classifier(GPT(12, 8, 2, 64, 16), fused=True)


class Operations(TorchDispatchMode):
    """Counts calls of aten."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class Watched:
    """Counts operations of the guard in each step."""

    def __init__(self, guard: NaNGuard, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[int] = []
        self._now = 0
        self._inside = False
        for owner, name in (*((guard, name) for name in HOOKS), (StepCheck, "fault")):
            monkeypatch.setattr(owner, name, self.watch(getattr(owner, name), last=name == HOOKS[-1]))

    def watch(self, call: Any, *, last: bool) -> Any:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return call(*args, **kwargs)
            self._inside = True
            operations = Operations()
            try:
                with operations:
                    return call(*args, **kwargs)
            finally:
                self._inside = False
                self._now += operations.count
                if last:
                    self.steps.append(self._now)
                    self._now = 0

        return watched


def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured is not joined first, as it is on the host."""
    for module in (norms, meter):
        monkeypatch.setattr(module, "is_on_host", lambda tensor: False)


def train(model: LightningModule, batch: Any, guard: NaNGuard, steps: int = 40) -> None:
    torch.manual_seed(0)
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[guard],
    )  # fmt: skip
    trainer.fit(model, DataLoader([batch] * steps, batch_size=None))
    assert len(guard.interventions) == 0


def words() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, 64, (2, 16), generator=draw), torch.randint(0, 64, (2, 16), generator=draw)


def images() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 16, 16, generator=draw), torch.randint(0, 10, (4,), generator=draw)


@pytest.mark.parametrize(
    ("model", "readback", "most"),
    [("gpt", "deferred", 12), ("gpt", "step", 6), ("norms", "deferred", 22), ("norms", "step", 9)],
)
def test_a_healthy_step_keeps_within_its_budget_of_operations(
    model: str, readback: Any, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not grow with the number of parameters (148), and not with that of batch-norm buffers (24 and more)."""
    as_on_a_device(monkeypatch)
    made, batch = (gpt2(), words()) if model == "gpt" else (Classifier(resnet(), fused=True), images())
    assert len(list(made.parameters())) == 148 or len(list(made.buffers())) >= 24
    guard = NaNGuard(readback=readback, snapshot_every_n_steps=1000, dirpath=tmp_path)
    seen = Watched(guard, monkeypatch)
    train(made, batch, guard)
    assert statistics.median(seen.steps) <= most
    assert max(seen.steps[10:]) <= most


class TensorRate(LightningModule):
    """Its learning rate is a tensor, as for compiled and captured steps."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.AdamW(self.parameters(), lr=torch.tensor(1e-2), fused=True)


class Reads(TorchDispatchMode):
    """Counts numbers that the host reads."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_rate_that_is_a_tensor_is_read_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cut and a limit in force: on a device each read is a wait."""
    guard = NaNGuard(readback="deferred", dirpath=tmp_path, snapshot_every_n_steps=1000)
    reads: dict[int, int] = defaultdict(int)
    ends, steps = guard.on_train_batch_end, iter(range(40))

    def end(*args: Any) -> Any:
        step = next(steps)
        if step == 10:
            assert guard._fit is not None
            guard._fit.context.rate.set_multiplier(0.5, max_lr=4e-3)
        with Reads() as counted:
            result = ends(*args)
        reads[step] = counted.count
        return result

    monkeypatch.setattr(guard, "on_train_batch_end", end)
    train(TensorRate(), torch.randn(4, 8), guard)
    assert sum(count > 0 for count in reads.values()) <= 3
    assert all(count == 0 for step, count in reads.items() if step < 10)


class Sharded(Tensor):
    """A tensor that keeps its part as ``DTensor`` does; to ask it for that part goes through the dispatcher."""

    @staticmethod
    def __new__(cls, part: Tensor) -> Any:
        made = Tensor._make_subclass(cls, torch.zeros(2 * len(part)))
        made._local_tensor = part
        return made

    def to_local(self) -> Tensor:
        raise AssertionError("the part is at hand")


def test_shards_are_read_without_the_dispatcher() -> None:
    """The gradient norm of sharded parameters costs what that of their parts costs."""
    parts = [torch.full((3,), float(index)) for index in range(148)]
    gradients = [Sharded(part) for part in parts]
    with Operations() as counted:
        found = dense_gradients(gradients)
    assert counted.count == 0
    assert all(one is part for one, part in zip(found, parts, strict=True))


def test_norms_of_several_dtypes_are_taken_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call for each dtype, however they are mixed, in the order of the tensors."""
    as_on_a_device(monkeypatch)
    kinds = (torch.float32, torch.bfloat16, torch.float64)
    tensors = [torch.full((4,), float(index), dtype=kinds[index % 3]) for index in range(30)]
    with Operations() as counted:
        found = norms.partial_norms(tensors)
    assert counted.count == 3
    assert same_bits([float(one) for one in found], [2.0 * index for index in range(30)])

"""Exceptions that numbers have caused."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from lightning_nanguard import NaNGuard
from lightning_nanguard.trainer.repeat.numeric_errors import finite_in, is_numeric, may_be_numeric, with_values_of
from tests.helpers import Task, batches, fit, mlp, with_bad, with_nan


def raised(run: Any) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run()
    return caught.value


def throw(error: BaseException) -> None:
    raise error


def anomaly() -> None:
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        x = torch.zeros(1, requires_grad=True)
        (x.sqrt() * 0).backward()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.filterwarnings("ignore:Error detected in")
class NanError(RuntimeError):
    """A type of a package's own."""


@pytest.mark.parametrize(
    ("run", "numeric"),
    [
        (lambda: torch.distributions.Normal(torch.tensor(np.nan), 1.0, validate_args=True), True),
        (lambda: torch.linalg.cholesky(-torch.eye(2)), True),
        (lambda: torch.linalg.eigvalsh(torch.full((6, 6), np.nan)), True),
        (lambda: np.linalg.inv(np.zeros((2, 2))), True),
        (lambda: 1 / 0, True),
        (lambda: int(float("nan")), True),
        (anomaly, True),
        (lambda: torch.zeros(2) @ torch.zeros(3), False),
        (lambda: torch.zeros(2)[5], False),
        (lambda: {}["a"], False),
        (lambda: b"\xff".decode("utf-8"), False),
        (lambda: torch.zeros(1).backward(), True),
        (lambda: throw(Exception("Loss is NaN, training stopped.")), True),
        (lambda: throw(RuntimeError("the loss is not finite")), True),
        (lambda: throw(NanError("cholesky_cpu: 1742 of 3600 elements of the input are NaN.")), True),
        (lambda: throw(NanError("Matrix not positive definite after repeatedly adding jitter.")), True),
        (lambda: throw(NanError("the disk is full")), False),
        (lambda: throw(NotImplementedError("isnan is not implemented for NaN")), False),
        (lambda: throw(RuntimeError("CUDA error: an assertion about nan failed")), False),
        (lambda: throw(RuntimeError("no information in the banana: a finite loss")), False),
        (lambda: throw(KeyError("nan")), False),
        (lambda: throw(OSError("nan.csv cannot be read")), False),
        (lambda: throw(torch.OutOfMemoryError("out of memory for nan")), False),
        (lambda: (_ for _ in ()).throw(KeyboardInterrupt) if False else json.loads(3), False),
    ],
)
def test_types_that_numbers_can_cause(run: Any, numeric: bool) -> None:
    """Checks of values, solvers, anomaly mode and what says NaN or Inf, also a constant in the place of the loss; no
    shape, index, memory, device, file or text."""
    assert is_numeric(raised(run)) is numeric


def test_a_batch_with_the_values_of_another() -> None:
    """Structure, length and whole numbers are the batch's own; floating numbers are the other's, row by row."""
    bad = {"x": torch.full((3, 2), torch.nan), "y": torch.tensor([1, 2, 3]), "weight": torch.tensor(0.5)}
    good = {"x": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "y": torch.tensor([7, 8]), "weight": torch.tensor(2.0)}
    made = with_values_of(bad, good)
    assert made["x"].tolist() == [[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]]
    assert made["y"].tolist() == [1, 2, 3]
    assert float(made["weight"]) == 2.0


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        ([torch.zeros(2)], [torch.zeros(2), torch.zeros(2)]),
        ([torch.zeros(2, 3)], [torch.zeros(2, 4)]),
        ([torch.zeros(2)], [torch.zeros(2, dtype=torch.float64)]),
        ([torch.zeros(2, dtype=torch.int64)], [torch.zeros(2, dtype=torch.int64)]),
    ],
)
def test_batches_that_cannot_lend_values(bad: Any, good: Any) -> None:
    """Another number of tensors, other shapes or types; and where there are only whole numbers there is nothing."""
    assert with_values_of(bad, good) is None


def test_a_batch_without_what_is_not_finite() -> None:
    """NaN and Inf become zeros, all else stays; there is nothing to be made of a finite batch."""
    made = finite_in({"x": torch.tensor([1.0, math.nan, -math.inf]), "y": torch.tensor([1])})
    assert made["x"].tolist() == [1.0, 0.0, 0.0]
    assert made["y"].tolist() == [1]
    assert finite_in({"x": torch.zeros(2), "y": torch.tensor([1])}) is None
    assert finite_in(None) is None


class DrawsRows(Task):
    """Trains on one row of each batch, drawn by chance, and raises where its loss is not finite."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        row = int(torch.randint(len(batch[0]), ()))
        loss = super().training_step((batch[0][row : row + 1], batch[1][row : row + 1]), batch_idx)
        if not torch.isfinite(loss):
            raise Exception("Loss is NaN, training stopped.")
        return loss


@pytest.mark.usefixtures("own_folder")
def test_bad_rows_that_lie_in_healthy_batches_too() -> None:
    """Where every batch holds the bad row and few steps draw it, these steps alone are skipped."""
    guard = NaNGuard()
    fit(DrawsRows(mlp()), [with_nan(batch, row=3) for batch in batches(count=40)], guard)
    assert 0 < len(guard.interventions) < 20
    assert {one.remedies for one in guard.interventions} == {("skip",)}


class DivergedError(Exception):
    """An exception of the user's own."""


class ChecksItsLoss(Task):
    """Does with a loss that is not finite what some packages do."""

    def __init__(self, reaction: str) -> None:
        super().__init__(mlp())
        self.reaction = reaction

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.reaction == "no graph":
            return loss.detach()
        if self.reaction == "index":
            torch.nn.functional.embedding((batch[0][:, 0].clamp(-1, 1) * 4 + 4).long(), torch.zeros(9, 1))
        if torch.isfinite(loss) or "backward" in self.reaction:
            return loss
        if self.reaction == "constant":
            return torch.tensor(1e9)
        if self.reaction == "own exception":
            raise DivergedError("stop here")
        raise Exception("Loss is NaN, training stopped.")

    def on_before_backward(self, loss: torch.Tensor) -> None:
        if self.reaction == "before backward" and not torch.isfinite(loss):
            raise ValueError("the loss is NaN")

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        if self.reaction == "backward" and not torch.isfinite(loss):
            raise ValueError("the loss is NaN")
        super().backward(loss, *args, **kwargs)

    def on_after_backward(self) -> None:
        gradients = [one.grad for one in self.parameters() if one.grad is not None]
        if self.reaction == "after backward" and not all(bool(torch.isfinite(one).all()) for one in gradients):
            raise RuntimeError("a gradient is NaN")


REACTIONS = ["constant", "exception", "own exception", "index", "before backward", "backward", "after backward"]


@pytest.mark.usefixtures("own_folder")
@pytest.mark.parametrize("reaction", REACTIONS)
def test_a_module_that_checks_its_loss_is_guarded(reaction: str) -> None:
    """A constant in the place of the loss, an exception without a type or of the user's own, an index out of range, and
    an exception in a hook of the module are a bad batch, and its cause is named."""
    guard = NaNGuard()
    fit(ChecksItsLoss(reaction), with_bad(12), guard)
    assert [(one.batch_idx, one.remedies, one.cause) for one in guard.interventions] == [
        (12, ("skip",), "non_finite_input")
    ]


@pytest.mark.usefixtures("own_folder")
def test_a_loss_that_never_has_a_graph_is_the_users_error() -> None:
    """The same exception is raised where the numbers are not its cause."""
    with pytest.raises(RuntimeError, match="does not require grad"):
        fit(ChecksItsLoss("no graph"), with_bad(), NaNGuard())


@pytest.mark.parametrize(
    ("error", "numeric"),
    [
        (IndexError("index out of range in self"), True),
        (KeyError(-9223372036854775808), True),
        (RuntimeError("Class values must be non-negative."), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (RuntimeError("NCCL communicator was aborted"), False),
        (OSError("disk full"), False),
        (ImportError("no module"), False),
        (MemoryError(), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_a_batch_with_nan_may_cause_any_exception_of_code(error: BaseException, numeric: bool) -> None:
    """NaN as an index is out of range. Files, memory, devices and communication fail for other reasons."""
    assert may_be_numeric(error, {"x": torch.tensor([1.0, math.nan])}) is numeric
    assert not may_be_numeric(error, {"x": torch.tensor([1.0])})


class RaisesAtTen(Task):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if batch_idx == 10:
            raise DivergedError("stop here")
        return super().training_step(batch, batch_idx)


@pytest.mark.usefixtures("own_folder")
def test_an_exception_in_a_finite_batch_is_raised() -> None:
    """An exception of the user's own, in a batch without NaN, reaches the user."""
    with pytest.raises(DivergedError, match="stop here"):
        fit(RaisesAtTen(mlp()), batches(count=12), NaNGuard())

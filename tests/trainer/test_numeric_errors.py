"""Exceptions that numbers have caused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from lightning_nanguard.trainer.numeric_errors import is_numeric, with_values_of


def raised(run: Any) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run()
    return caught.value


def anomaly() -> None:
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        x = torch.zeros(1, requires_grad=True)
        (x.sqrt() * 0).backward()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.filterwarnings("ignore:Error detected in")
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
        (lambda: torch.zeros(1).backward(), False),
        (lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory")), False),
        (lambda: (_ for _ in ()).throw(KeyboardInterrupt) if False else json.loads(3), False),
    ],
)
def test_types_that_numbers_can_cause(run: Any, numeric: bool) -> None:
    """Checks of values, solvers and anomaly mode; no shape, index, memory, device or text."""
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

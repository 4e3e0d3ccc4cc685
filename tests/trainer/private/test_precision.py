"""What the precision plugin keeps."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_nanguard.trainer.private.precision import autocasts_to_half, grad_scaler
from tests.helpers import trainer_for


@pytest.mark.parametrize(("precision", "half"), [("32-true", False), ("bf16-mixed", False), ("16-mixed", True)])
def test_half_precision_is_told_by_its_scaler(precision: Any, half: bool) -> None:
    """Only 16-mixed has a GradScaler and casts to float16."""
    trainer = trainer_for(precision=precision)
    assert (grad_scaler(trainer) is not None) is half
    assert autocasts_to_half(trainer) is half

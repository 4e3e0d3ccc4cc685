"""The trainer's precision plugin."""

from __future__ import annotations

import torch

from lightning_nanguard.trainer.private.precision import autocasts_to_half, grad_scaler
from tests.helpers import trainer_for


def test_what_a_precision_brings() -> None:
    """Only 16-mixed has a GradScaler and autocasts to float16."""
    half = trainer_for(precision="16-mixed")
    assert isinstance(grad_scaler(half), torch.amp.GradScaler)
    assert autocasts_to_half(half)
    for precision in ("32-true", "bf16-mixed"):
        trainer = trainer_for(precision=precision)
        assert grad_scaler(trainer) is None
        assert not autocasts_to_half(trainer)

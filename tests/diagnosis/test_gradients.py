"""Gradients against finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_nanguard.diagnosis.gradients import check_gradients
from lightning_nanguard.state.attributes import attributes_kept
from tests.classifier import MIDDLE, Model, Numbers
from tests.helpers import differences, seed_all


@pytest.mark.parametrize("middle", list(MIDDLE))
def test_gradients_against_finite_differences(middle: str) -> None:
    """Right gradients agree to many digits, wrong ones do not; weights and random streams come back bit for bit."""
    seed_all()
    model = Model(middle)
    model.log = lambda *args, **kwargs: None  # type: ignore[method-assign, assignment]
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    batch = next(iter(Numbers().train_dataloader()))

    def around() -> Any:
        torch.manual_seed(4)
        return attributes_kept(model)

    checks = check_gradients(model, batch, lambda given: model.training_step(given, 0), around)
    wrong = {"wrong": True, "reversed": True, "detached": False}
    assert max(one.error for one in checks) > 0.05 if middle in wrong else all(one.error < 1e-5 for one in checks)
    assert [one.custom for one in checks if one.custom] == [True] * (middle in ("wrong", "right", "reversed"))
    if wrong.get(middle):
        (custom,) = (one for one in checks if one.custom)
        assert custom.error > 0.05
        assert custom.place.startswith("net.1 (backward of ")
        ratio = {"wrong": 2.0, "reversed": -1.0}[middle]
        assert custom.numeric == pytest.approx(ratio * custom.analytic, rel=1e-4)
    buffers = {name: tensor for name, tensor in model.named_buffers() if middle == "dropout"}
    after = {name: tensor for name, tensor in model.state_dict().items() if name not in buffers}
    assert differences({name: before[name] for name in after}, after) == []
    assert torch.get_default_dtype() == torch.float32

"""Hyperparameters with which an optimizer diverges by itself."""

from __future__ import annotations

import pytest
import torch

from lightning_nanguard.diagnosis.optimizer_settings import unstable_setting


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        (torch.optim.SGD, {"lr": 0.01, "momentum": 0.99, "weight_decay": 1.0}, ""),
        (torch.optim.SGD, {"lr": 0.01, "momentum": 1.0}, "the momentum is 1: "),
        (torch.optim.SGD, {"lr": 0.1, "weight_decay": 100.0}, "multiplies each weight by -9 in every update"),
        (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 100.0}, "Use a weight decay far below 20"),
        (torch.optim.AdamW, {"lr": 0.001, "weight_decay": 1000.0}, ""),
        (torch.optim.Adam, {"lr": 0.05, "weight_decay": 100.0}, ""),
        # The rate is the one of the two that is absurd.
        (torch.optim.AdamW, {"lr": 300.0}, ""),
        (torch.optim.SGD, {"lr": 700.0, "weight_decay": 0.01}, ""),
        (torch.optim.AdamW, {"lr": torch.tensor(0.05), "weight_decay": 100.0}, ""),
    ],
)
def test_what_diverges_by_itself_is_named(
    kind: type[torch.optim.Optimizer], settings: dict[str, object], said: str
) -> None:
    """A momentum of 1 or more, or a decay that enlarges weights, unless the rate is to blame for that; no value is read
    from a device."""
    found = unstable_setting([kind([torch.zeros(2, requires_grad=True)], **settings)])
    assert said in found
    assert bool(said) == bool(found)


def test_the_weights_do_grow_at_such_a_decay() -> None:
    """With a gradient of zero, a decay above 2 / lr enlarges weights, and one below it does not."""
    for decay, grows in ((21.0, True), (19.0, False)):
        weight = torch.ones(1, requires_grad=True)
        optimizer = torch.optim.SGD([weight], lr=0.1, weight_decay=decay)
        for _ in range(20):
            weight.grad = torch.zeros(1)
            optimizer.step()
        assert (abs(weight.item()) > 1) is grows
        assert bool(unstable_setting([optimizer])) is grows

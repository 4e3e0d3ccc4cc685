"""Hyperparameters with which an optimizer diverges by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_nanguard import NaNGuard
from lightning_nanguard.diagnosis.optimizer_settings import unstable_setting
from lightning_nanguard.types import Evidence
from tests.helpers import batches, fit, task


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


@pytest.mark.parametrize(
    ("kind", "settings", "seen", "said"),
    [
        (torch.optim.AdamW, {"lr": 0.001}, Evidence(160, growth=23.5), "to 1.02 times their size in every update"),
        (torch.optim.SGD, {"lr": 0.001, "momentum": 0.9}, Evidence(40, growth=9.0), "to about 1.2 times their size"),
        # The weights did not grow, or the decay explains little of it, or the rate is the odder of the two.
        (torch.optim.AdamW, {"lr": 0.001}, Evidence(160, growth=1.5), ""),
        (torch.optim.AdamW, {"lr": 0.001}, Evidence(20, growth=23.5), ""),
        (torch.optim.AdamW, {"lr": 0.001}, Evidence(160, growth=23.5, multiplier=0.01), ""),
        (torch.optim.AdamW, {"lr": 10.0}, Evidence(160, growth=23.5), ""),
        (torch.optim.Adam, {"lr": 0.001}, Evidence(160, growth=23.5), ""),
    ],
)
def test_a_negative_weight_decay_is_named(
    kind: type[torch.optim.Optimizer], settings: dict[str, float], seen: Evidence, said: str
) -> None:
    """With its growth per update, if the weights grew and the decay alone makes them grow as much."""
    optimizer = kind([torch.zeros(2, requires_grad=True)], **settings)
    optimizer.param_groups[0]["weight_decay"] = -20.0
    found = unstable_setting([optimizer], evidence=seen)
    assert said in found
    assert bool(said) == bool(found)


def test_a_run_that_diverges_by_a_negative_weight_decay(tmp_path: Path) -> None:
    """The decay is named, and not the rate, which is fine."""

    def adamw(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        made = torch.optim.AdamW(parameters, 1e-3)
        made.param_groups[0]["weight_decay"] = -40.0
        return made

    guard = NaNGuard(dirpath=tmp_path)
    fit(task(optimizer=adamw), batches(count=200), guard, folder=tmp_path)
    told = {one.finding.cause: one.finding.suggestion for one in guard.advice}
    assert "to 1.04 times their size in every update" in told["unstable_hyperparameter"]
    assert "learning_rate_too_high" not in told

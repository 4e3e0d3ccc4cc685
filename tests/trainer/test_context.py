"""A fit is put together as the arguments ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_nanguard import NaNGuard
from lightning_nanguard.guard.local_readback import LocalReadback
from lightning_nanguard.guard.plan_runner import ActingRunner, ObservingRunner
from lightning_nanguard.thresholds import Thresholds
from lightning_nanguard.trainer.context import _deferred
from lightning_nanguard.trainer.fit import Fit
from tests.helpers import Task, fp16, mlp, trainer_for
from tests.trainer.fits import captured

THRESHOLDS = Thresholds()

GIVEN: dict[str, dict[str, Any]] = {
    "nothing": {},
    "deferred": {"readback": "deferred"},
    "observed": {"observe": True},
    "the rest": {
        "snapshot_every_n_steps": 5,
        "snapshot_device": "cpu",
        "max_snapshots": 2,
        "examine_after": 16,
        "thresholds": THRESHOLDS,
    },
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Fit]:
    """One fit of two batches for each set of arguments."""
    folder = tmp_path_factory.mktemp("build")
    return {name: captured(NaNGuard(**given), folder=folder)[0].fit for name, given in GIVEN.items()}


@pytest.mark.parametrize(
    ("given", "late", "runner"),
    [
        ("nothing", False, ActingRunner),
        ("deferred", True, ActingRunner),
        ("observed", False, ObservingRunner),
        ("the rest", False, ActingRunner),
    ],
)
def test_the_parts_are_those_asked_for(built: dict[str, Fit], given: str, late: bool, runner: type) -> None:
    """How readings arrive, and whether the guard acts."""
    parts = built[given].guard._parts
    assert (type(parts.readback), type(parts.judge.runner)) == (LocalReadback, runner)
    assert parts.caution.may_be_late(0) is late


def test_what_is_left_out_is_chosen(built: dict[str, Fit]) -> None:
    """The interval of snapshots, and where they lie."""
    settings = built["nothing"].context.settings
    assert (settings.snapshot_every, settings.snapshot_device, settings.choose_place) == (None, None, True)
    assert built["nothing"].context.ring.capacity == 3
    assert built["nothing"].context.thresholds == Thresholds()


def test_what_is_given_is_taken(built: dict[str, Fit]) -> None:
    """Numbers, places and thresholds reach the guard."""
    context = built["the rest"].context
    settings = context.settings
    assert (settings.snapshot_every, settings.snapshot_device) == (5, torch.device("cpu"))
    assert not settings.choose_place
    assert context.ring.capacity == 2
    assert context.thresholds is THRESHOLDS


def test_fits_share_nothing_but_the_memory_of_interventions(built: dict[str, Fit]) -> None:
    """Two guards have two contexts."""
    assert len({id(one.context.monitors) for one in built.values()}) == len(GIVEN)
    assert len({id(one.context.state) for one in built.values()}) == len(GIVEN)


class OnCuda(Task):
    """Says that it lies on a GPU."""

    device = torch.device("cuda")


def adam(net: nn.Module, *, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), fused=fused)


@pytest.mark.parametrize(
    ("readback", "kind", "fused", "scaler", "deferred"),
    [
        ("auto", OnCuda, [True], False, True),
        ("auto", OnCuda, [True, True], False, True),
        ("auto", OnCuda, [True, False], False, False),
        ("auto", OnCuda, [False], False, False),
        ("auto", OnCuda, [True], True, False),
        ("auto", Task, [True], False, False),
        ("step", OnCuda, [True], False, False),
        ("deferred", Task, [False], False, True),
    ],
)
def test_auto_defers_where_the_device_can_skip(
    readback: str, kind: type[Task], fused: list[bool], scaler: bool, deferred: bool, tmp_path: Path
) -> None:
    """On a GPU with fused optimizers alone and no GradScaler; what the user says is taken otherwise."""
    module = kind(mlp())
    trainer = trainer_for(tmp_path, **({"plugins": [fp16()]} if scaler else {}))
    trainer.optimizers = [adam(module.net, fused=one) for one in fused]
    assert _deferred(readback, trainer, module) is deferred

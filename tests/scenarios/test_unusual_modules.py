"""Modules and optimizers that are put together in an unusual way come back as they were."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, Trainer
from torch import nn
from torch.optim import SGD, AdamW

from lightning_nanguard import NaNGuard
from tests import modules
from tests.helpers import (
    FaultAt,
    Run,
    batches,
    fit,
    learner_of,
    non_finite,
    with_bad,
    words,
)
from tests.modules import NaNWeight, make

pytestmark = pytest.mark.usefixtures("own_folder")

BAD_BATCH = 9


BAD_WEIGHT = 14


def assert_alive(run: Run) -> None:
    """Nothing of the learner is lost, and it has gone on learning after the last intervention."""
    assert non_finite(learner_of(run.trainer, run.module)) == []


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.filterwarnings("ignore:The total number of parameters detected may be inaccurate")
@pytest.mark.parametrize("bad", ["batch", "first batch", "weight"])
def test_lazy_layers(bad: str) -> None:
    """Layers that take shape with the first batch are guarded from then on."""
    guard = NaNGuard()
    data = with_bad(*{"batch": [BAD_BATCH], "first batch": [0]}.get(bad, []))
    callbacks = [NaNWeight(6)] if bad == "weight" else []
    done = fit(make(modules.lazy)(), data, guard, callbacks=callbacks)
    assert words(guard) == [("restore", "redo") if bad == "weight" else ("skip",)]
    assert_alive(done)


def test_minus_inf_mask() -> None:
    """A mask of −inf is no fault, through snapshots, certifications and a restore, and stays as it is."""
    guard = NaNGuard(snapshot_every_n_steps=1)
    done = fit(make(modules.Masked)(), batches(count=24), guard, callbacks=[NaNWeight(BAD_WEIGHT, "net.key.weight")])
    assert words(guard) == [("restore", "redo")]
    assert guard.interventions[0].place == "parameter net.key.weight"
    assert done.module.net.mask.isinf().sum() == 15


def test_mask_that_goes_bad_elsewhere() -> None:
    """NaN in a buffer whose −inf are by design is still corruption."""
    guard = NaNGuard(snapshot_every_n_steps=1)
    fit(make(modules.Masked)(), batches(count=24), guard, callbacks=[NaNWeight(BAD_WEIGHT, "net.mask")])
    # The element was finite when fit began.
    assert words(guard) == [("restore", "redo")]
    assert guard.interventions[0].place == "buffer net.mask"


def test_non_persistent_buffer() -> None:
    """A buffer that no state_dict holds is rewound with the rest."""
    guard = NaNGuard(snapshot_every_n_steps=1)
    done = fit(make(modules.Masked)(), batches(count=24), guard, callbacks=[NaNWeight(BAD_WEIGHT, "net.running")])
    assert words(guard) == [("restore", "redo")]
    assert guard.interventions[0].place == "buffer net.running"
    assert bool(done.module.net.running.isfinite().all())


def test_tied_weights_stay_tied() -> None:
    """A restore keeps two names of one parameter one parameter."""
    guard = NaNGuard(snapshot_every_n_steps=1)
    done = fit(make(modules.Tied)(), batches(count=24), guard, callbacks=[NaNWeight(BAD_WEIGHT)])
    assert words(guard) == [("restore", "redo")]
    assert done.module.net.one.weight is done.module.net.two.weight


@pytest.mark.parametrize("after", [6, 20, 30])
def test_unfreezing(after: int) -> None:
    """Before, with and after the unfreezing of a layer, a lost weight comes back, and the layer stays unfrozen."""
    guard = NaNGuard(snapshot_every_n_steps=4)
    name = "net.2.weight" if after < 12 else "net.0.weight"
    fault = NaNWeight(after, name)
    done = fit(
        make(optimizer=lambda p: AdamW([q for q in p if q.requires_grad], lr=0.01))(),
        batches(count=12),
        guard,
        callbacks=[modules.Unfreeze(), fault],
        max_epochs=3,
    )
    assert fault.hits == 1
    assert words(guard) == [("restore", "redo")]
    assert_alive(done)
    assert all(p.requires_grad for p in done.module.parameters())
    assert len(done.trainer.optimizers[0].param_groups) == 2


def test_weight_lost_right_after_unfreezing() -> None:
    """A weight of a layer lost with its first update comes back though no snapshot has seen its moments."""
    guard = NaNGuard(snapshot_every_n_steps=8)
    done = fit(
        make(optimizer=lambda p: AdamW([q for q in p if q.requires_grad], lr=0.01))(),
        batches(count=12),
        guard,
        callbacks=[modules.Unfreeze(), NaNWeight(13, "net.0.weight")],
        max_epochs=2,
    )
    assert words(guard) == [("restore",)]
    assert_alive(done)


@pytest.mark.parametrize("part", ["generator", "discriminator"])
def test_gan_gradient(part: str) -> None:
    """A gradient that goes bad in one of two optimizers costs one step of a batch and names its place."""

    class Poison(Callback):
        seen = 0

        def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
            network = getattr(pl_module, part)
            if network[0].weight.requires_grad and network[0].weight.grad is not None:
                self.seen += 1
                if self.seen == 9:
                    network[0].weight.grad[0, 0] = math.nan

    guard = NaNGuard()
    done = fit(modules.Gan(), batches(count=24), guard, callbacks=[Poison()])  # type: ignore[arg-type]
    assert words(guard) == [("skip",)]
    assert guard.interventions[0].place == f"gradient of {part}.0.weight"
    assert non_finite(learner_of(done.trainer, done.module)) == []


def test_gan_moment() -> None:
    """A moment lost in the second of two optimizers is restored."""
    guard = NaNGuard(snapshot_every_n_steps=2)
    fault = FaultAt("moment", math.inf, 14, "discriminator.0.weight")
    done = fit(modules.Gan(), batches(count=24), guard, callbacks=[fault])  # type: ignore[arg-type]
    assert fault.hits == 1
    assert [i.remedies for i in guard.interventions] == [("restore",)]
    assert "discriminator.0.weight" in guard.interventions[0].place
    assert non_finite(learner_of(done.trainer, done.module)) == []


def test_tensor_rate_is_kept() -> None:
    """A learning rate that is a tensor stays the same object with the same value through a restore."""
    rate = torch.tensor(0.01)
    guard = NaNGuard(snapshot_every_n_steps=2)
    build = make(optimizer=lambda p: AdamW(p, lr=rate))
    done = fit(build(), batches(count=24), guard, callbacks=[NaNWeight(BAD_WEIGHT)])
    assert words(guard) == [("restore",)]
    assert done.trainer.optimizers[0].param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.01)


def test_groups_keep_their_rates() -> None:
    """Every group's own rate and decay are as the user set them after a skip and a restore."""
    guard = NaNGuard(snapshot_every_n_steps=2)
    done = fit(make(kind=modules.TwoGroups)(), with_bad(BAD_BATCH), guard, callbacks=[NaNWeight(BAD_WEIGHT)])
    assert words(guard) == [("skip",), ("restore", "redo")]
    groups = done.trainer.optimizers[0].param_groups
    assert [group["lr"] for group in groups] == [0.003, 0.01]
    assert [group["weight_decay"] for group in groups] == [0.01, 0.1]


def test_plain_sgd_without_state() -> None:
    """An optimizer without any state is restored as one without any state."""
    guard = NaNGuard(snapshot_every_n_steps=2)
    done = fit(make(optimizer=lambda p: SGD(p, lr=0.05))(), batches(count=24), guard, callbacks=[NaNWeight(BAD_WEIGHT)])
    assert words(guard) == [("restore", "redo")]
    assert_alive(done)
    assert isinstance(done.module, nn.Module)

"""The guard saves a run in every way to train on one device."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.plugins import MixedPrecision
from torch import nn
from torch.optim import LBFGS, SGD, AdamW
from torch.utils.data import DataLoader

from lightning_nanguard import NaNGuard, TrainingDivergedError
from tests import modules
from tests.helpers import (
    Batch,
    FaultAt,
    Run,
    States,
    Task,
    batches,
    copied,
    differences,
    fit,
    learner_of,
    mlp,
    non_finite,
    state_of,
    task,
    with_bad,
    words,
)
from tests.modules import NaNWeight, make

pytestmark = [
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`"),
    pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor"),
    pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument"),
    pytest.mark.usefixtures("own_folder"),
]

BAD_BATCH = 9
BAD_WEIGHT = 14


def adam(**options: Any) -> Callable[..., AdamW]:
    return lambda parameters: AdamW(parameters, lr=options.pop("lr", 0.01), **options)


def compiled(backend: str) -> Callable[[], Task]:
    def build() -> Task:
        module = task()
        module.net = torch.compile(module.net, backend=backend)
        return module

    return build


# Name: what makes the module, and options of the Trainer.
MODES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "32-true": (make(), {}),
    "64-true": (make(), {"precision": "64-true"}),
    "bf16-mixed": (make(), {"precision": "bf16-mixed"}),
    "16-mixed": (make(), {"precision": "16-mixed"}),
    "16-mixed clipped": (make(), {"precision": "16-mixed", "gradient_clip_val": 0.5}),
    "16-mixed accumulated": (make(), {"precision": "16-mixed", "accumulate_grad_batches": 2}),
    "fused": (make(optimizer=adam(fused=True)), {}),
    "fused 16-mixed": (make(optimizer=adam(fused=True)), {"precision": "16-mixed"}),
    "foreach": (make(optimizer=adam(foreach=True)), {}),
    "momentum": (make(optimizer=lambda p: modules.sgd(p, momentum=0.9, nesterov=True)), {}),
    "accumulated by 2": (make(), {"accumulate_grad_batches": 2}),
    "accumulated by 4": (make(), {"accumulate_grad_batches": 4}),
    "clipped by norm": (make(), {"gradient_clip_val": 0.5}),
    "clipped by value": (make(), {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}),
    "own clipping": (make(kind=modules.OwnClipping), {}),
    "16-mixed clipped by value": (
        make(),
        {"precision": "16-mixed", "gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
    ),
    "gan": (modules.Gan, {}),
    "two optimizers": (lambda: task("manual"), {}),
    "lbfgs": (make(optimizer=lambda p: LBFGS(p, lr=0.1, max_iter=3, history_size=3)), {}),
    "lbfgs line search": (make(optimizer=lambda p: LBFGS(p, max_iter=3, line_search_fn="strong_wolfe")), {}),
    "unused and frozen parameters": (make(modules.Unused), {}),
    "step gives None": (make(kind=modules.SometimesNone), {}),
    "step gives a dict": (make(kind=modules.GivesDict), {}),
    "dataloader_iter": (make(kind=modules.FromIterator), {}),
    "tied weights": (make(modules.Tied), {}),
    "masked": (make(modules.Masked), {}),
    "complex": (make(modules.Complex), {}),
    "two groups": (make(kind=modules.TwoGroups), {}),
    "tensor rate": (make(optimizer=lambda p: AdamW(p, lr=torch.tensor(0.01))), {}),
    "batch norm": (make(lambda: mlp(norm=True)), {}),
    "torch.compile": (compiled("eager"), {}),
}
SLOW = {"torch.compile"}


def every_mode() -> list[Any]:
    """All modes, the slow ones marked as such."""
    return [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in MODES]


def run(mode: str, data: list[Batch], guard: NaNGuard | None, *callbacks: Callback, **more: Any) -> Run:
    build, options = MODES[mode]
    return fit(build(), data, guard, callbacks=callbacks, **{**options, **more})


def assert_alive(run: Run) -> None:
    """Nothing of the learner is lost, and it has gone on learning after the last intervention."""
    assert non_finite(learner_of(run.trainer, run.module)) == []


def assert_only_skips(guard: NaNGuard, count: int = 1) -> None:
    assert words(guard) == [("skip",)] * count, list(guard.interventions)
    assert guard.lr_multiplier == 1.0
    assert guard.clip_val is None


@pytest.mark.parametrize("mode", every_mode())
def test_bad_batch(mode: str) -> None:
    """One batch with NaN is skipped, whatever is trained and how, and nothing else is changed."""
    guard = NaNGuard()
    done = run(mode, with_bad(BAD_BATCH), guard)
    assert_alive(done)
    # Two optimizers meet the same batch; it may be one record for the batch or one for each.
    assert {i.remedies for i in guard.interventions} == {("skip",)}, list(guard.interventions)
    assert len(guard.interventions) <= len(done.trainer.optimizers)
    assert guard.interventions[0].batch_idx // done.trainer.accumulate_grad_batches == (
        BAD_BATCH // done.trainer.accumulate_grad_batches
    )
    assert guard.lr_multiplier == 1.0
    assert guard.clip_val is None


@pytest.mark.parametrize("mode", every_mode())
def test_bad_weight(mode: str) -> None:
    """One weight that becomes NaN is restored, and neither the learning rate nor clipping changes for it."""
    guard = NaNGuard(snapshot_every_n_steps=2)
    fault = NaNWeight(BAD_WEIGHT)
    done = run(mode, batches(count=24), guard, fault)
    assert fault.hits == 1
    assert_alive(done)
    assert [i.remedies for i in guard.interventions] == [("restore",)], list(guard.interventions)
    assert guard.interventions[0].snapshot_step is not None
    assert guard.interventions[0].place.startswith("parameter")


@pytest.mark.parametrize(
    "first",
    [pytest.param(True, id="first micro-batch"), pytest.param(False, id="last micro-batch")],
)
@pytest.mark.parametrize("accumulate", [2, 4])
def test_bad_micro_batch(first: bool, accumulate: int) -> None:
    """One NaN micro-batch costs its window and nothing more, wherever in the window it stands."""
    guard = NaNGuard()
    bad = 8 if first else 8 + accumulate - 1
    done = fit(make()(), with_bad(bad), guard, accumulate_grad_batches=accumulate)
    assert_alive(done)
    assert_only_skips(guard)


def test_bad_weight_within_a_window() -> None:
    """A weight lost between two micro-batches of one window is restored as well."""
    guard = NaNGuard(snapshot_every_n_steps=2)
    done = fit(make()(), batches(count=24), guard, callbacks=[NaNWeight(13)], accumulate_grad_batches=4)
    assert_alive(done)
    assert words(guard) == [("restore",)]


# ---------------------------------------------------------------------------------------------------- fp16


class Scale(Callback):
    """The loss scale after every batch."""

    def __init__(self) -> None:
        self.after: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.after.append(float(trainer.precision_plugin.scaler.get_scale()))


def scaled(init_scale: float, growth_interval: int = 1000) -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=growth_interval)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


@pytest.mark.parametrize("fused", [False, True])
def test_ordinary_overflows(fused: bool) -> None:
    """Overflows while the scaler looks for its scale are its own business: no intervention, the same bits."""
    build = make(optimizer=adam(fused=fused))
    scale = Scale()
    guard = NaNGuard()
    guarded = fit(build(), batches(count=24), guard, callbacks=[scale], **scaled(2.0**28))
    assert scale.after[0] < 2.0**28, "no overflow happened, so nothing was tested"
    assert list(guard.interventions) == []
    bare = fit(build(), batches(count=24), callbacks=[Scale()], **scaled(2.0**28))
    assert differences(state_of(bare), state_of(guarded)) == []


@pytest.mark.parametrize("fused", [False, True])
def test_streak_of_overflows(fused: bool) -> None:
    """Overflow upon overflow that no scale cures is the learner's fault, and the scale never goes up for it."""
    guard = NaNGuard(snapshot_every_n_steps=2)
    scale = Scale()
    hits = FaultAt("gradient", math.inf, range(12, 34))
    done = fit(
        make(optimizer=adam(fused=fused))(),
        batches(count=48),
        guard,
        callbacks=[hits, scale],
        **scaled(2.0**26, growth_interval=4),
    )
    assert {i.fault for i in guard.interventions} == {"loss_scale_collapse"}
    assert "restore" in guard.interventions[0].remedies
    after = scale.after[12:34]
    assert all(now <= before for before, now in pairwise(after)), after
    assert_alive(done)


def test_scale_at_its_floor() -> None:
    """Overflow at a scale below 1 is the learner's fault at once."""
    guard = NaNGuard(snapshot_every_n_steps=2)
    fit(make()(), batches(count=24), guard, callbacks=[FaultAt("gradient", math.inf, 10)], **scaled(0.5))
    assert [i.fault for i in guard.interventions] == ["loss_scale_collapse"]


def test_overflow_that_never_ends() -> None:
    """A learner whose gradient overflows at every scale ends the run, in a bounded number of steps."""
    guard = NaNGuard()
    with pytest.raises(TrainingDivergedError, match="loss_scale_collapse"):
        fit(
            make()(),
            batches(count=24),
            guard,
            callbacks=[FaultAt("gradient", math.inf, range(10, 10_000))],
            max_epochs=100,
            **scaled(1024.0),
        )


def test_nan_loss_under_a_scaler() -> None:
    """A loss that is NaN is no overflow: it is on record, and the scale is left where the scaler puts it."""
    guard = NaNGuard()
    done = fit(make()(), with_bad(BAD_BATCH), guard, precision="16-mixed")
    assert [i.fault for i in guard.interventions] == ["non_finite_loss"]
    assert_alive(done)


# ---------------------------------------------------------------------------------------------------- data


@pytest.mark.filterwarnings("ignore:train_dataloader yielded None")
def test_none_batch() -> None:
    """A batch of None is Lightning's to leave out; the guard goes on past it, with a fault right after it."""
    data: list[Any] = with_bad(BAD_BATCH)
    data[BAD_BATCH - 1] = None
    guard = NaNGuard()
    done = fit(make()(), data, guard)
    assert_only_skips(guard)
    assert_alive(done)


@pytest.mark.parametrize("bad", [False, True], ids=["healthy", "bad batch"])
def test_no_length(bad: bool) -> None:
    """A dataset that knows no length is trained on like any other."""
    guard = NaNGuard()
    loader = DataLoader(modules.Stream(with_bad(*[BAD_BATCH] if bad else [])), batch_size=None)
    done = fit(make()(), loader, guard, val=batches(count=1), limit_val_batches=0, max_epochs=2)
    assert_only_skips(guard, 2 if bad else 0)
    assert_alive(done)


def test_dictionary_batches() -> None:
    """A NaN inside a nested batch is found to be the batch's fault."""

    class Nested(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step((batch["in"]["x"], batch["out"][0]), batch_idx)

    data = [{"in": {"x": x, "name": "some"}, "out": [y]} for x, y in with_bad(BAD_BATCH)]
    guard = NaNGuard()
    assert_alive(fit(make(kind=Nested)(), data, guard))  # type: ignore[arg-type]
    assert_only_skips(guard)
    assert guard.interventions[0].cause == "non_finite_input"


# ---------------------------------------------------------------------------------------------------- modules


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.filterwarnings("ignore:The total number of parameters detected may be inaccurate")
@pytest.mark.parametrize("bad", ["batch", "first batch", "weight"])
def test_lazy_layers(bad: str) -> None:
    """Layers that take shape with the first batch are guarded from then on."""
    guard = NaNGuard()
    data = with_bad(*{"batch": [BAD_BATCH], "first batch": [0]}.get(bad, []))
    callbacks = [NaNWeight(6)] if bad == "weight" else []
    done = fit(make(modules.lazy)(), data, guard, callbacks=callbacks)
    assert words(guard) == [("restore",) if bad == "weight" else ("skip",)]
    assert_alive(done)


def test_minus_inf_mask() -> None:
    """A mask of −inf is no fault, through snapshots, certifications and a restore, and stays as it is."""
    guard = NaNGuard(snapshot_every_n_steps=1)
    done = fit(make(modules.Masked)(), batches(count=24), guard, callbacks=[NaNWeight(BAD_WEIGHT, "net.key.weight")])
    assert words(guard) == [("restore",)]
    assert guard.interventions[0].place == "parameter net.key.weight"
    assert done.module.net.mask.isinf().sum() == 15


def test_mask_that_goes_bad_elsewhere() -> None:
    """NaN in a buffer whose −inf are by design is still corruption."""
    guard = NaNGuard(snapshot_every_n_steps=1)
    fit(make(modules.Masked)(), batches(count=24), guard, callbacks=[NaNWeight(BAD_WEIGHT, "net.mask")])
    # The element was finite when fit began.
    assert words(guard) == [("restore",)]
    assert guard.interventions[0].place == "buffer net.mask"


def test_non_persistent_buffer() -> None:
    """A buffer that no state_dict holds is rewound with the rest."""
    guard = NaNGuard(snapshot_every_n_steps=1)
    done = fit(make(modules.Masked)(), batches(count=24), guard, callbacks=[NaNWeight(BAD_WEIGHT, "net.running")])
    assert words(guard) == [("restore",)]
    assert guard.interventions[0].place == "buffer net.running"
    assert bool(done.module.net.running.isfinite().all())


def test_tied_weights_stay_tied() -> None:
    """A restore keeps two names of one parameter one parameter."""
    guard = NaNGuard(snapshot_every_n_steps=1)
    done = fit(make(modules.Tied)(), batches(count=24), guard, callbacks=[NaNWeight(BAD_WEIGHT)])
    assert words(guard) == [("restore",)]
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
    assert words(guard) == [("restore",)]
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
    assert words(guard) == [("skip",), ("restore",)]
    groups = done.trainer.optimizers[0].param_groups
    assert [group["lr"] for group in groups] == [0.003, 0.01]
    assert [group["weight_decay"] for group in groups] == [0.01, 0.1]


@pytest.mark.parametrize("mode", ["32-true", "64-true", "bf16-mixed", "fused", "accumulated by 2", "batch norm"])
def test_restore_is_bitwise(mode: str) -> None:
    """What a restore puts back is bit by bit what stood there at the step on record."""
    guard = NaNGuard(snapshot_every_n_steps=2)
    states = States()
    restored: dict[str, Any] = {}

    class Look(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            if guard.interventions and not restored:
                restored.update(copied(learner_of(trainer, pl_module)))

    run(mode, batches(count=24), guard, Look(), NaNWeight(BAD_WEIGHT), states)
    assert words(guard) == [("restore",)]
    step = guard.interventions[0].snapshot_step
    assert step is not None
    wanted = states.after[step]
    # States runs after the guard, so what it copied at that step is what the snapshot holds.
    for part in ("parameters", "buffers", "optimizers"):
        assert differences(wanted[part], restored[part]) == [], part


def test_no_harm_in_every_mode() -> None:
    """A healthy run has the same bits with and without the guard, in every mode."""
    for mode in MODES:
        if mode in SLOW:
            continue
        bare = run(mode, batches(count=8), None)
        guarded = run(mode, batches(count=8), guard := NaNGuard(snapshot_every_n_steps=2))
        assert list(guard.interventions) == [], mode
        assert differences(state_of(bare), state_of(guarded)) == [], mode


@pytest.mark.slow
def test_compiled_module() -> None:
    """A LightningModule that was compiled as a whole is guarded under the names of its parameters."""
    guard = NaNGuard(snapshot_every_n_steps=2)
    module = torch.compile(make(kind=modules.Quiet)(), backend="aot_eager")
    trainer_options = {"callbacks": [NaNWeight(BAD_WEIGHT)]}
    done = fit(module, with_bad(BAD_BATCH), guard, **trainer_options)  # type: ignore[arg-type]
    assert words(guard) == [("skip",), ("restore",)]
    assert non_finite(dict(done.trainer.lightning_module.named_parameters())) == []


def test_plain_sgd_without_state() -> None:
    """An optimizer without any state is restored as one without any state."""
    guard = NaNGuard(snapshot_every_n_steps=2)
    done = fit(make(optimizer=lambda p: SGD(p, lr=0.05))(), batches(count=24), guard, callbacks=[NaNWeight(BAD_WEIGHT)])
    assert words(guard) == [("restore",)]
    assert_alive(done)
    assert isinstance(done.module, nn.Module)

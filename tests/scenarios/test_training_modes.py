"""The guard saves a run in every way to train on one device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch.optim import LBFGS, AdamW
from torch.utils.data import DataLoader

from lightning_nanguard import NaNGuard
from tests import modules
from tests.helpers import (
    ONCE,
    Batch,
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
def test_a_bad_batch_and_a_bad_weight(mode: str) -> None:
    """One batch with NaN is skipped and one weight that becomes NaN is restored, whatever is trained and how; neither
    the learning rate nor clipping changes for it."""
    guard = NaNGuard(snapshot_every_n_steps=2)
    fault = NaNWeight(BAD_WEIGHT)
    done = run(mode, with_bad(BAD_BATCH), guard, fault)
    assert fault.hits == 1
    assert_alive(done)
    *skips, restore = guard.interventions
    # Two optimizers meet the same batch; it may be one record for the batch or one for each.
    window = done.trainer.accumulate_grad_batches
    assert {i.remedies for i in skips} == {("skip",) if window == 1 else ("leave out",)}, list(guard.interventions)
    assert len(skips) <= len(done.trainer.optimizers)
    assert guard.interventions[0].batch_idx // window == BAD_BATCH // window
    assert restore.remedies[0] == "restore", list(guard.interventions)
    assert restore.snapshot_step is not None
    assert restore.place.startswith("parameter")
    assert guard.lr_multiplier == 1.0
    assert guard.clip_val is None


@pytest.mark.parametrize(
    "first",
    [pytest.param(True, id="first micro-batch"), pytest.param(False, id="last micro-batch")],
)
@pytest.mark.parametrize("accumulate", [2, 4])
def test_bad_micro_batch(first: bool, accumulate: int) -> None:
    """One NaN micro-batch costs itself and nothing more, wherever in the window it stands."""
    guard = NaNGuard()
    bad = 8 if first else 8 + accumulate - 1
    done = fit(make()(), with_bad(bad), guard, accumulate_grad_batches=accumulate)
    assert_alive(done)
    assert words(guard) == [("leave out",)]
    assert guard.interventions[0].batch_idx == bad
    assert guard.lr_multiplier == 1.0


def test_bad_weight_within_a_window() -> None:
    """A weight lost between two micro-batches of one window is restored as well."""
    guard = NaNGuard(snapshot_every_n_steps=2)
    done = fit(make()(), batches(count=24), guard, callbacks=[NaNWeight(13)], accumulate_grad_batches=4)
    assert_alive(done)
    assert words(guard) == [("restore", "redo")]


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


@pytest.mark.parametrize("mode", ["32-true", "64-true", "bf16-mixed", "fused", "accumulated by 2", "batch norm"])
def test_restore_is_bitwise(mode: str) -> None:
    """What a restore puts back is bit by bit what stood there at the step on record."""
    guard = NaNGuard(thresholds=ONCE, snapshot_every_n_steps=2)
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
    assert words(guard) == [("skip",), ("restore", "redo")]
    assert non_finite(dict(done.trainer.lightning_module.named_parameters())) == []

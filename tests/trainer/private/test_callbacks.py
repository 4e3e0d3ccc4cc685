"""The guard's place among the callbacks."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import LearningRateFinder

from lightning_nanguard import NaNGuard
from lightning_nanguard.trainer.private.callbacks import after_every_batch, put_first
from tests.helpers import batches, fit, task, trainer_for


class Holder:
    def __init__(self, callbacks: list[Callback]) -> None:
        self.callbacks = callbacks


class Said(Callback):
    def __init__(self, said: list[str]) -> None:
        self.said = said

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.said.append("callback")


def test_a_function_behind_all_callbacks() -> None:
    """It is called when a batch is over for every callback in the list, and is gone when it is undone."""
    said: list[str] = []
    undos = []

    class Adds(Callback):
        def on_train_start(self, trainer: Trainer, *args: Any) -> None:
            undos.append(after_every_batch(trainer, lambda: said.append("function")))

        def on_train_epoch_end(self, trainer: Trainer, *args: Any) -> None:
            if undos:
                undos.pop()()

    run = fit(task(), batches(count=2), callbacks=[Adds(), Said(said)], max_epochs=2)
    assert said == ["callback", "function"] * 2 + ["callback"] * 2
    assert [type(one).__name__ for one in run.trainer.callbacks[:2]] == ["Adds", "Said"]
    assert not any(type(one).__name__ == "_LastCallback" for one in run.trainer.callbacks)


def test_the_guard_comes_first_but_for_tuners() -> None:
    """The guard moves ahead of every callback except tuners that stand first; the list itself is not changed."""
    guard, tuner, other = Callback(), LearningRateFinder(), Callback()
    for before, after in (
        ([other, guard], [guard, other]),
        ([tuner, other, guard], [tuner, guard, other]),
        ([other, tuner, guard], [guard, other, tuner]),
    ):
        holder = Holder(list(before))
        given = holder.callbacks
        put_first(holder, guard)
        assert holder.callbacks == after
        assert given == before


def test_the_guard_goes_back_to_its_place() -> None:
    """It stands behind those it stood behind, also where callbacks were added or taken out meanwhile; it is not put
    back where it was taken out itself."""
    guard, tuner, first, last, new = Callback(), LearningRateFinder(), Callback(), Callback(), Callback()
    for before, change, after in (
        ([first, guard, last], lambda now: now, [first, guard, last]),
        ([tuner, first, guard], lambda now: now, [tuner, first, guard]),
        ([first, guard, last], lambda now: [*now, new], [first, guard, last, new]),
        ([first, guard, last], lambda now: [one for one in now if one is not first], [guard, last]),
        ([first, guard, last], lambda now: [one for one in now if one is not guard], [first, last]),
    ):
        holder = Holder(list(before))
        undo = put_first(holder, guard)
        holder.callbacks = change(holder.callbacks)
        undo()
        assert holder.callbacks == after


@pytest.mark.parametrize("fails", [False, True], ids=["ends", "fails"])
def test_after_a_fit_the_order_is_the_users(fails: bool) -> None:
    """The trainer's callbacks stand as before the fit, also after an exception and after a second fit."""

    class Fails(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            if fails:
                raise KeyError("failed")

    guard = NaNGuard()
    trainer = trainer_for(None, callbacks=[Said([]), Fails(), guard])
    given = list(trainer.callbacks)
    assert given[-1] is guard
    data = torch.utils.data.DataLoader(batches(count=2), batch_size=None)
    for _ in range(2):
        with pytest.raises(KeyError, match="failed") if fails else nullcontext():
            trainer.fit(task(), data, data)
        assert trainer.callbacks == given

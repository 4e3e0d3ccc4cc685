"""The guard's place among the callbacks."""

from __future__ import annotations

from typing import Any

from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import LearningRateFinder

from lightning_nanguard.trainer.private.callbacks import after_every_batch, put_first
from tests.helpers import batches, fit, task


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

    class Holder:
        def __init__(self, callbacks: list[Callback]) -> None:
            self.callbacks = callbacks

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

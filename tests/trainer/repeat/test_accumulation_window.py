"""The micro-batches of an update, kept until it is made; that a window is made again is in test_step_runner.py."""

from __future__ import annotations

import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_nanguard.state.random_state import RandomStreams
from lightning_nanguard.state.step_start import StepMemory, StepStart
from lightning_nanguard.thresholds.batches import RepeatedStepsThresholds
from lightning_nanguard.trainer.private.closures import MicroBatchRun
from lightning_nanguard.trainer.repeat.accumulation_window import AccumulationWindow
from lightning_nanguard.types import Fault


def window_of(
    *batches: Any, most: int = 1 << 20, began: bool = True, memory: StepMemory | None = None
) -> AccumulationWindow:
    trainer: Any = SimpleNamespace(
        accumulate_grad_batches=len(batches), fit_loop=SimpleNamespace(_should_accumulate=lambda: False)
    )
    limits = replace(RepeatedStepsThresholds(), window_bytes=most)
    window = AccumulationWindow(trainer, SimpleNamespace(), limits)  # type: ignore[arg-type]
    memory, streams = memory or StepMemory(nn.Linear(1, 1)), RandomStreams(torch.device("cpu"))
    for index, batch in enumerate(batches):
        zero_grad = (lambda: None) if index == 0 and began else None
        run = MicroBatchRun(None, batch, index, True, lambda: None, zero_grad, lambda: None, lambda batch: None)  # type: ignore[arg-type]
        window.add(run, memory.open(batch, streams.open()))
    return window


def test_a_window_is_kept_up_to_so_many_bytes() -> None:
    """Beyond them, and where its beginning was not seen, it cannot be made again."""
    assert window_of(torch.zeros(4), [torch.zeros(4)]).is_kept()
    assert not window_of(torch.zeros(4), [torch.zeros(4)], most=31).is_kept()
    window = window_of(torch.zeros(4), torch.zeros(4))
    del window.micros[0]
    assert not window.is_kept()
    window.close()
    assert not window.is_kept()


@pytest.mark.parametrize("began", [True, False])
def test_batches_that_are_not_kept_are_freed(began: bool) -> None:
    """Beyond so many bytes, or where the window's beginning was not seen, only the newest batch stays; all count."""
    parts = [[torch.zeros(4)] for _ in range(4)]
    alive = [weakref.ref(part[0]) for part in parts]
    window = window_of(*parts, most=31 if began else 1 << 20, began=began)
    parts.clear()
    assert [one() is not None for one in alive] == [False, False, False, True]
    assert [micro.run.batch_idx for micro in window.micros] == [0, 1, 2, 3]
    assert window.whole() == []


def test_what_steps_carry_counts() -> None:
    """A hidden state that each micro-batch begins with is kept with it."""
    module = nn.Linear(1, 1)
    carried = iter(torch.zeros(3, 8))

    class Carries(StepMemory):
        def open(self, batch: Any, random: Any) -> StepStart:
            module.hidden = next(carried)  # type: ignore[assignment]
            return super().open(batch, random)

    batches = [torch.zeros(1)] * 3
    assert window_of(*batches, most=3 * 4 + 2 * 32, memory=Carries(module)).is_kept()
    carried = iter(torch.zeros(3, 8))
    assert not window_of(*batches, most=3 * 4 + 2 * 32 - 1, memory=Carries(module)).is_kept()


def test_a_new_window_begins_where_gradients_are_emptied() -> None:
    """What came before is let go of."""
    window = window_of(torch.zeros(4), torch.zeros(4))
    again = window_of(torch.zeros(4)).micros[0]
    window.add(again.run, again.start)
    assert len(window.micros) == 1


def test_the_mean_of_the_good_ones() -> None:
    """Gradients that were divided by the length of the window become those of the micro-batches left in it."""
    window = window_of(*[torch.zeros(1)] * 4)
    gradients = [torch.ones(2), torch.ones(2, 2).to_sparse()]
    window.weigh(lambda: gradients)
    assert gradients[0].tolist() == [1.0, 1.0]
    window.micros[1].left_out = window.micros[3].left_out = Fault("non_finite_loss", "batch", "loss")
    window.weigh(lambda: gradients)
    assert gradients[0].tolist() == [2.0, 2.0]
    assert gradients[1].to_dense().tolist() == [[2.0, 2.0], [2.0, 2.0]]
    assert [micro.run.batch_idx for micro, _ in window.left_out()] == [1, 3]
    for micro in window.micros:
        micro.left_out = Fault("non_finite_loss", "batch", "loss")
    window.weigh(lambda: gradients)
    assert gradients[0].tolist() == [2.0, 2.0], "nothing is left"

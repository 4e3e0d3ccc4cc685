"""The micro-batches of an update, kept until it is made; that a window is made again is in test_step_runner.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from lightning_nanguard.state.random_state import RandomStreams
from lightning_nanguard.state.step_start import StepMemory
from lightning_nanguard.thresholds.batches import RepeatedStepsThresholds
from lightning_nanguard.trainer.private.closures import MicroBatchRun
from lightning_nanguard.trainer.window import Window, gradients_of
from lightning_nanguard.types import Fault


def window_of(*batches: Any, most: int = 1 << 20) -> Window:
    trainer: Any = SimpleNamespace(accumulate_grad_batches=len(batches))
    limits = replace(RepeatedStepsThresholds(), window_bytes=most)
    window = Window(trainer, SimpleNamespace(), limits)  # type: ignore[arg-type]
    memory, streams = StepMemory(nn.Linear(1, 1)), RandomStreams(torch.device("cpu"))
    for index, batch in enumerate(batches):
        zero_grad = (lambda: None) if index == 0 else None
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


def test_copies_of_gradients(tmp_path: Path) -> None:
    """None for a parameter without one."""
    one, other = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    one.grad = torch.ones(1)
    copies = gradients_of([one, other])
    one.grad.fill_(2.0)
    assert copies[1] is None
    assert float(copies[0]) == 1.0

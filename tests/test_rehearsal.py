"""Rates are tried out without a trace."""

from __future__ import annotations

import torch

from lightning_nanguard.rehearsal import Rehearsal
from lightning_nanguard.snapshot import capture
from tests.helpers import copied, same_bits
from tests.test_engine import Loop


def state(loop: Loop) -> dict[str, object]:
    return {
        "weights": dict(loop.net.named_parameters()),
        "moments": loop.optimizer.state_dict(),
        "gradients": {name: parameter.grad for name, parameter in loop.net.named_parameters()},
        "random": torch.get_rng_state(),
    }


def test_a_trial_leaves_no_trace() -> None:
    """Weights, moments, rates, gradients and random numbers are bit by bit as before, whatever it found."""
    loop = Loop(lr=1e-3)
    loop.run(10)
    rehearsal = Rehearsal(loop.guard.learner, loop.guard.rate, loop)
    start = capture(loop.guard.learner, step=0, global_step=0)
    loop.run(5)
    before = copied(state(loop))
    assert rehearsal.lower_rate_is_better(start, scale=1.0) is False
    assert same_bits(state(loop), before)


def test_a_lower_rate_is_found_better() -> None:
    """At a rate that ruins, a lower one from the start learns the batch; at a good rate none does better."""
    answers = []
    for lr in (30.0, 0.1):
        loop = Loop(lr=lr)
        loop.batch = torch.randn(8, 3)
        rehearsal = Rehearsal(loop.guard.learner, loop.guard.rate, loop)
        start = capture(loop.guard.learner, step=0, global_step=0)
        loop.train_once()
        answers.append(rehearsal.lower_rate_is_better(start, scale=1.0))
    assert answers == [True, False]


def test_losses_are_those_of_the_rate() -> None:
    """The losses rehearsed are those that training at that rate has, and the learner is left where it began."""
    loop = Loop(lr=0.1)
    loop.batch = torch.randn(8, 3)
    rehearsal = Rehearsal(loop.guard.learner, loop.guard.rate, loop)
    base = capture(loop.guard.learner, step=0, global_step=0)
    rehearsed = rehearsal.losses(base, 0.5, 5)
    assert rehearsed is not None
    loop.optimizer.param_groups[0]["lr"] = 0.05
    trained = [loop.train_once() for _ in range(5)]
    assert rehearsed[:5] == trained
    assert rehearsed[5] == loop.probe()

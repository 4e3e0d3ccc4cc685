"""What a Trainer answers the guard."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_nanguard import NaNGuard
from lightning_nanguard.trainer.loop import TrainerLoop
from tests.helpers import TwoOptimizers, batches, with_bad
from tests.trainer.fits import Captures, captured


@pytest.fixture(scope="module")
def accumulated(tmp_path_factory: pytest.TempPathFactory) -> Captures:
    """Two epochs of eight batches, two to an update, one of them bad."""
    seen, _ = captured(
        NaNGuard(),
        data=with_bad(5, count=8),
        look=lambda fit: (fit.guard._parts.loop.clock(), fit.guard._parts.loop.micro_batches()),
        folder=tmp_path_factory.mktemp("loop"),
        accumulate_grad_batches=2,
        max_epochs=2,
    )
    return seen


def test_the_clock_is_the_trainers(accumulated: Captures) -> None:
    """Updates made so far, the epoch, and the batch at hand in it."""
    clocks = [clock for clock, _ in accumulated.seen]
    assert [clock[0] for clock in clocks] == [(batches_done + 1) // 2 for batches_done in range(16)]
    assert [clock[1:] for clock in clocks] == [(epoch, index) for epoch in range(2) for index in range(8)]


def test_a_loss_is_divided_by_the_window(accumulated: Captures) -> None:
    """Under accumulation by its length."""
    assert {count for _, count in accumulated.seen} == {2}


def test_records_reach_the_sinks_with_their_cause(accumulated: Captures) -> None:
    """One of each epoch, under the clock of its batch's update, diagnosed from the batch itself."""
    records = list(accumulated.guard.interventions)
    assert [(one.epoch, one.batch_idx, one.remedies) for one in records] == [
        (0, 5, ("leave out",)),
        (1, 5, ("leave out",)),
    ]
    assert [one.cause for one in records] == ["non_finite_input"] * 2
    assert isinstance(accumulated.fit.guard._parts.loop, TrainerLoop)


def test_by_hand_nothing_is_divided(tmp_path: Path) -> None:
    """Whatever the user does with the losses is the user's."""
    seen, _ = captured(
        NaNGuard(),
        module=TwoOptimizers(),
        data=batches(count=2),
        look=lambda fit: fit.guard._parts.loop.micro_batches(),
        folder=tmp_path,
    )
    assert seen.seen == [1, 1]

"""LearningRateMonitor sees the effective learning rate."""

from __future__ import annotations

import pytest
from pytorch_lightning.callbacks import (
    LearningRateMonitor,
)

from lightning_nanguard import NaNGuard
from tests.modules import Diverge
from tests.scenarios.companions import (
    train,
)

pytestmark = [
    # Lightning's own advice and notes about what these tests do on purpose.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Swapping scheduler"),
    pytest.mark.usefixtures("own_folder"),
]


def test_rate_monitor_shows_the_effective_rate() -> None:
    """LearningRateMonitor logs the rate that steps really use after a cut, whichever of the two is listed first."""
    for first in (True, False):
        guard = NaNGuard(snapshot_every_n_steps=2)
        monitor = LearningRateMonitor("step")
        faults = [Diverge(6, 9)]
        run = train([monitor], guard, faults=faults, first=first)
        if guard.lr_multiplier == 1.0:
            pytest.fail(f"no cut was made: {list(guard.interventions)}")
        shown = [row["lr-SGD"] for _, row in run.logger.rows if "lr-SGD" in row]
        scheduled = [0.05 * 0.5 ** (step // 7) for step in range(len(shown))]
        assert shown[5] == pytest.approx(scheduled[5])
        assert shown[-1] == pytest.approx(scheduled[-1] * guard.lr_multiplier)
        # What the optimizer and the checkpoint hold is the schedule's own rate.
        assert run.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 * 0.5 ** (30 // 7))

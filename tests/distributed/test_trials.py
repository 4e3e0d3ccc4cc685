"""Ranks try lower rates together, and find out together what an intervention gained."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.conftest import Launch
from tests.distributed.test_ddp import agreed

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this build has no gloo"),
    pytest.mark.timeout(450),
]


def test_a_healthy_run_is_the_same(launched: Launch) -> None:
    """With trials allowed every bit of weights and moments is as without the guard."""
    results = launched("fork", 2, "trials")
    assert agreed(results, "healthy")["end"] == agreed(results, "healthy, bare")["end"]
    assert agreed(results, "healthy")["records"] == []


def test_a_rate_that_is_too_high_is_cut(launched: Launch) -> None:
    """The same verdict on both ranks saves a run that learns nothing at its rate, and both have the same receipts."""
    results = launched("fork", 2, "trials")
    saved, bare, good = (agreed(results, name) for name in ("ruined", "ruined, bare", "healthy"))
    assert saved["error"] is None
    assert any("scale" in record["remedies"] for record in saved["records"])
    assert saved["loss"] < good["loss"] + 0.2 * (bare["loss"] - good["loss"])
    assert results[0]["ruined"]["receipts"] == results[1]["ruined"]["receipts"] != []


def test_a_batch_that_one_rank_cannot_run_again(launched: Launch) -> None:
    """The trial ends on both ranks without a verdict, and the run goes on to its end."""
    seen = agreed(launched("fork", 2, "trials"), "broken off")
    assert (seen["error"], seen["steps"]) == (None, 240)
    assert all("scale" not in record["remedies"] for record in seen["records"])

"""Where many updates are skipped for a few bad samples, the advice names what helps, once."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_nanguard import NaNGuard, SkipStep
from lightning_nanguard.act.defaults import default_remedies
from lightning_nanguard.trainer.skip_share import SkipShare
from lightning_nanguard.types import Intervention
from tests.trainer.test_sample_finder import rows, trained

SKIP = Intervention(7, 0, 7, "non_finite_loss", "loss", ("skip",), 0.1, 0.1)


def test_only_what_was_skipped_counts() -> None:
    """Other remedies, and what was only observed, are no skipped updates."""
    share = SkipShare()
    for other in (replace(SKIP, remedies=("restore",)), replace(SKIP, applied=False)):
        assert [share.note(other, 20) for _ in range(5)] == [None] * 5
    assert [share.note(SKIP, 20) is None for _ in range(4)] == [True, True, False, True]


BAD = {f"x{row}": math.nan for row in range(0, 192, 24)}


@pytest.mark.parametrize("kept", [False, True])
def test_advice_in_a_run(kept: bool, tmp_path: Path) -> None:
    """A third of all batches is skipped: the advice names ``keep_good_samples``; none where that is on."""
    remedies: list[Any] = [SkipStep(keep_good_samples=kept), *default_remedies()]
    guard: NaNGuard = trained(rows(192, **BAD), tmp_path, max_epochs=2, guard={"remedies": remedies})
    said = [one.finding for one in guard.advice if one.finding.cause == "many_skipped_batches"]
    assert len(said) == (0 if kept else 1)
    assert all("SkipStep(keep_good_samples=True)" in one.suggestion for one in said)

"""What ranks agree on together, and a run of one process."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, cast

import pytest
import torch

from lightning_nanguard.distributed.ranks import (
    Ranks,
    SingleProcess,
    checksums,
    first_over_ranks,
    is_replicated,
    mean_over_ranks,
    most_confident_over_ranks,
)
from lightning_nanguard.measure.checksum import checksum
from lightning_nanguard.state.snapshot import Snapshot
from lightning_nanguard.types import Finding
from tests.distributed.test_report import HEALTHY


class RankZero:
    """Rank 0 of several, which knows what the others answer."""

    def __init__(self, answers: tuple[Any, ...]) -> None:
        self.world, self._answers = len(answers) + 1, answers

    def gather(self, value: Any) -> list[Any]:
        return [value, *self._answers]


def among(*answers: Any) -> Ranks:
    return cast(Ranks, RankZero(answers))


def finding(confidence: float, samples: tuple[int, ...] = ()) -> Finding:
    return Finding("non_finite_input", confidence, {"share": 0.5}, samples=samples)


def test_a_mean_needs_a_value_of_each_rank() -> None:
    """The mean over ranks, and none where a rank has no value."""
    assert mean_over_ranks(among(3.0), 1.0) == 2.0
    assert mean_over_ranks(among(None), 1.0) is None


def test_the_first_value_is_that_of_the_lowest_rank() -> None:
    """The lowest rank's value, and who has one where not all do."""
    assert first_over_ranks(among("b", "c"), None) == ("b", (1, 2))
    assert first_over_ranks(among("b"), "a") == ("a", ())
    assert first_over_ranks(among(None), None) == (None, ())


def test_the_most_confident_finding_wins() -> None:
    """All ranks take the same finding: the one of highest confidence, among equals one that names samples."""
    other = asdict(finding(0.9, samples=(1,)))
    assert most_confident_over_ranks(among(other), finding(0.5)) == finding(0.9, samples=(1,))
    assert most_confident_over_ranks(among(other), finding(0.9)) == finding(0.9, samples=(1,))
    assert most_confident_over_ranks(among(other), finding(0.95)) == finding(0.95)
    assert most_confident_over_ranks(among(None), None) is None
    assert most_confident_over_ranks(SingleProcess(), finding(0.5)) == finding(0.5)


def test_a_single_process_agrees_with_itself() -> None:
    """It keeps snapshots whole, and has nobody to report to."""
    ranks = SingleProcess(sharded=True)
    snapshot = Snapshot(1, 1, {("parameter", "w"): torch.ones(1000)})
    assert (ranks.rank, ranks.world, ranks.snapshot_parts, ranks.sharded) == (0, 1, 1, True)
    assert ranks.gather([1, None]) == [[1, None]]
    assert ranks.join_snapshot(ranks.split_snapshot(snapshot)) is snapshot
    ranks.average([torch.ones(1)])
    ranks.leave()
    ranks.close()
    with pytest.raises(RuntimeError, match="no other rank to report to"):
        ranks.post(HEALTHY)


def test_only_what_all_ranks_hold_counts() -> None:
    """Parameters and optimizer state have a sum each; buffers, averaged copies and plain numbers count in none."""
    leaves = {
        ("parameter", "w"): torch.ones(3),
        ("optimizer", 0, "exp_avg"): torch.zeros(3),
        ("optimizer", 0, "step"): 3,
        ("buffer", "mean"): torch.full((3,), 2.0),
    }
    assert [key for key, leaf in leaves.items() if is_replicated(key, leaf)] == list(leaves)[:2]
    assert checksums(leaves) == (checksum([torch.ones(3)]), checksum([torch.zeros(3)]))

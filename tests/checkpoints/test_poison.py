"""Which tensors of a checkpoint are poisoned."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lightning_nanguard.checkpoints.poison import KnownWeights, poisoned

BAD = torch.tensor([1.0, math.nan])
WEIGHTS = {"w": torch.ones(2), "mask": torch.tensor([0.0, -math.inf])}
ALLOWED = {("buffer", "mask"): torch.tensor([False, True])}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"state_dict": {"w": torch.ones(2), "mask": WEIGHTS["mask"]}}, []),
        ({"state_dict": {"w": BAD, "mask": BAD}}, ["state_dict: w"]),
        ({"state_dict": {"mask": torch.tensor([-math.inf, 0.0])}}, ["state_dict: mask"]),
        (
            {"callbacks": {"EMA": {"average": {"module.w": BAD, "module.mask": WEIGHTS["mask"]}}}},
            ["callbacks/EMA/average: module.w"],
        ),
        ({"callbacks": {"scores": [BAD, {"other": BAD}]}, "loops": {"w": BAD[:1]}}, []),
        (
            {
                "optimizer_states": [
                    {"state": {3: {"exp_avg": BAD, "step": 1, "old": [{"d": BAD}]}}, "param_groups": []}
                ]
            },
            ["optimizer_states/0: exp_avg of parameter 3", "optimizer_states/0: old.d of parameter 3"],
        ),
    ],
    ids=["good", "weight", "mask elsewhere", "average", "not of the learner", "moments"],
)
def test_what_is_poisoned(content: dict[str, Any], named: list[str]) -> None:
    """Weights, averages and moments are looked at, wherever they lie; masks by design and other tensors are not."""
    assert poisoned(content, KnownWeights(WEIGHTS, ALLOWED)) == named

"""What of DeepSpeed the guard can work under; the runs are in ``tests/distributed/test_deepspeed.py``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from lightning_nanguard.trainer.private.deepspeed import ZeroPartitions, accumulation, unsupported


@pytest.mark.parametrize(
    ("config", "precision", "reason"),
    [
        ({}, "32-true", "without ZeRO"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "32-true",
            "with offload_optimizer",
        ),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "32-true", "with mics_shard_size"),
        ({"zero_optimization": {"stage": 1}}, "16-mixed", "with precision '16-mixed'"),
    ],
)
def test_what_is_not_supported_is_said(config: Any, precision: str, reason: str) -> None:
    """Each configuration that was not tried has a reason, and what to use instead."""
    said = unsupported(config, precision)
    assert said is not None
    assert said.startswith(reason)


def test_what_is_supported() -> None:
    """ZeRO in bfloat16 without offloading is."""
    zero = {"stage": 3, "offload_param": {"device": "none"}, "mics_shard_size": -1}
    assert unsupported({"zero_optimization": zero}, "bf16-mixed") is None


def test_another_optimizer_of_deepspeed_is_refused() -> None:
    """One whose partitions are not known cannot be put back."""
    with pytest.raises(ValueError, match=r"does not support DeepSpeed's SimpleNamespace\. Use ZeRO stage 1, 2 or 3"):
        ZeroPartitions(SimpleNamespace(), nn.Linear(1, 1))


@pytest.mark.parametrize("boundary", [True, False])
def test_steps_that_only_accumulate(boundary: bool) -> None:
    """DeepSpeed is asked to step after each micro-batch and knows when it will."""
    assert accumulation(SimpleNamespace(is_gradient_accumulation_boundary=lambda: boundary))() is not boundary

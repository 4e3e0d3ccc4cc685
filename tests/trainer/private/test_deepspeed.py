"""What of DeepSpeed is supported, without DeepSpeed; runs with it are in tests/distributed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_nanguard.trainer.private.deepspeed import ZeroPartitions, unsupported


@pytest.mark.parametrize(
    ("zero", "precision", "said"),
    [
        ({}, "32-true", "without ZeRO"),
        ({"stage": 1}, "32-true", None),
        ({"stage": 2, "offload_optimizer": {"device": "none"}, "mics_shard_size": -1}, "bf16-mixed", None),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, "32-true", "with offload_optimizer"),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, "32-true", "with offload_param"),
        ({"stage": 2, "cpu_offload": True}, "32-true", "with cpu_offload"),
        ({"stage": 3, "zero_hpz_partition_size": 8}, "32-true", "with zero_hpz_partition_size"),
        ({"stage": 1}, "16-mixed", "with precision '16-mixed'"),
    ],
)
def test_unsupported_options(zero: dict[str, Any], precision: str, said: str | None) -> None:
    """The first option that is not supported is named, with what to use instead."""
    found = unsupported({"zero_optimization": zero}, precision)
    assert found is None if said is None else str(found).startswith(said)
    if said is None:
        assert unsupported({"zero_optimization": zero, "fp16": {"enabled": True}}, precision) is not None


class DeepSpeedZeroOptimizer:
    """Stands for DeepSpeed's optimizer of stages 1 and 2."""

    def __init__(self, module: nn.Linear) -> None:
        self.optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        self.params_in_partition = {0: [module.weight, module.bias], 1: []}
        self.single_partition_of_fp32_groups = [torch.zeros(3)]
        padding = torch.zeros(1)
        padding._zero_padding = True  # type: ignore[attr-defined]
        self.averaged_gradients: dict[int, Any] = {0: [torch.ones(1, 2), padding, torch.ones(1)], 1: None}
        self._hp_optimizer_states_linked = True


def test_what_a_rank_steps() -> None:
    """Weights are the parameters and this rank's partition; gradients come by name, without padding."""
    module = nn.Linear(2, 1)
    zero = DeepSpeedZeroOptimizer(module)
    partitions = ZeroPartitions(zero, module)
    assert partitions.optimizer is zero.optimizer
    assert [name for name, _ in partitions.weights()] == ["weight", "bias", "fp32_partition.0"]
    assert list(partitions.stepped()) == ["fp32_partition.0"]
    assert [(name, len(gradient)) for name, gradient in partitions.gradients()] == [("weight", 1), ("bias", 1)]
    partitions.restored()
    assert zero._hp_optimizer_states_linked is False

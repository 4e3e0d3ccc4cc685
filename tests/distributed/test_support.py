"""Which strategies the guard refuses, and that the table in docs/distributed.md names real tests."""

from __future__ import annotations

import ast
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy

from lightning_nanguard import NaNGuard
from lightning_nanguard.trainer.private.deepspeed import ZeroPartitions
from tests.helpers import task

ROOT = Path(__file__).parents[2]


class DeepSpeedStrategy(SingleDeviceStrategy):
    """Has the name and a configuration; the real one asks for CUDA."""

    def __init__(self, stage: int = 2, **config: Any) -> None:
        super().__init__("cpu")
        self.config = {"zero_optimization": {"stage": stage, **config}} if stage else {}


class FSDPStrategy(SingleDeviceStrategy):
    """Has the name; the real one needs processes."""


@pytest.mark.parametrize(
    ("strategy", "devices", "told"),
    [
        (FSDPStrategy("cpu"), 1, "does not support FSDPStrategy with manual optimization.*ModelParallelStrategy"),
        (DDPStrategy(model_averaging_period=2), 2, r"does not support DDPStrategy\(model_averaging_period"),
    ],
)
def test_unsupported_strategies_are_refused(strategy: Any, devices: int, told: str, tmp_path: Path) -> None:
    """The fit ends in `setup`, with what to use instead."""
    trainer = Trainer(
        strategy=strategy, devices=devices, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(ValueError, match=told):
        NaNGuard().setup(trainer, task("manual"), "fit")


@pytest.mark.parametrize(
    ("strategy", "precision", "told"),
    [
        (DeepSpeedStrategy(0), "32-true", "without ZeRO.*Use strategy='ddp'"),
        (DeepSpeedStrategy(offload_optimizer={"device": "cpu"}), "32-true", "with offload_optimizer.*Turn offloading"),
        (DeepSpeedStrategy(3, offload_param={"device": "nvme"}), "32-true", "with offload_param.*or use FSDPStrategy"),
        (DeepSpeedStrategy(cpu_offload=True), "32-true", "with cpu_offload"),
        (DeepSpeedStrategy(3, zero_hpz_partition_size=8), "32-true", "with zero_hpz_partition_size.*Turn it off"),
        (DeepSpeedStrategy(3, zero_quantized_weights=True), "32-true", "with zero_quantized_weights"),
        (DeepSpeedStrategy(), "16-mixed", "with precision '16-mixed'.*Use precision='bf16-mixed'"),
        (DeepSpeedStrategy(), "16-true", "with precision '16-true'"),
        (DeepSpeedStrategy(2, offload_optimizer={"device": "none"}, zero_hpz_partition_size=1), "32-true", None),
        (DeepSpeedStrategy(3), "bf16-mixed", None),
    ],
)
def test_deepspeed_that_is_not_supported_is_refused(
    strategy: Any, precision: str, told: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What of DeepSpeed the guard cannot work under ends the fit in `setup`, with what to use instead."""
    trainer = Trainer(
        strategy=strategy, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    monkeypatch.setattr(type(trainer), "precision", precision)
    with nullcontext() if told is None else pytest.raises(ValueError, match=f"does not support DeepSpeed.*{told}"):
        NaNGuard().setup(trainer, task("mlp"), "fit")


def test_an_unknown_optimizer_of_deepspeed_is_refused() -> None:
    """What keeps its partitions elsewhere is refused by name, with what is missing."""

    class DeepSpeedZeroOptimizer:
        averaged_gradients = ()

    class ZenFlowZeroOptimizer:
        pass

    with pytest.raises(ValueError, match=r"DeepSpeed's ZenFlowZeroOptimizer\. Use ZeRO stage 1, 2 or 3"):
        ZeroPartitions(ZenFlowZeroOptimizer(), torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="without params_in_partition, single_partition_of_fp32_groups"):
        ZeroPartitions(DeepSpeedZeroOptimizer(), torch.nn.Linear(1, 1))


def test_the_table_names_real_tests() -> None:
    """Every test that docs/distributed.md names is there."""
    files = [*Path(__file__).parent.glob("test_*.py"), ROOT / "tests" / "trainer" / "repeat" / "test_ranks_again.py"]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    there = {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")))
    assert len(named) > 15
    assert named <= there

"""Access to the partitions that DeepSpeed's ZeRO trains instead of a module's parameters; for DeepSpeed 0.19.

Each rank updates its own partition in full precision (``fp32_partition``). After every step the module's parameters are
computed from the partitions. In stages 1 and 2 they are gathered as a whole. In stage 3 each rank has its part of each
parameter, which is gathered when needed. All are plain tensors, so they can be copied and restored bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, final

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_nanguard.errors import SettingsError

_GATHERED, _PARTITIONED = "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"
_USED = {
    _GATHERED: ("averaged_gradients", "params_in_partition", "single_partition_of_fp32_groups"),
    _PARTITIONED: (
        "averaged_gradients", "fp16_groups", "fp32_partitioned_groups_flat", "_partition_all_parameters",
    ),
}  # fmt: skip

# Options of `zero_optimization` that offload weights, and options that make further copies, with their "off" values.
_ELSEWHERE = ("offload_optimizer", "offload_param", "cpu_offload", "cpu_offload_params")
_OTHERWISE = {
    "mics_shard_size": -1,
    "super_offload": False,
    "zenflow": None,
    "zero_hpz_partition_size": 1,
    "zero_quantized_gradients": False,
    "zero_quantized_weights": False,
}


def unsupported(config: Mapping[str, Any], precision: str) -> str | None:
    """The option of a DeepSpeed configuration that the guard does not support, in words, and what to use instead.

    Args:
        config: The configuration.
        precision: The trainer's.

    Returns:
        ``None`` if the guard supports it.
    """
    zero = config.get("zero_optimization") or {}
    if not zero.get("stage"):
        return "without ZeRO, which does the same as DDP. Use strategy='ddp'"
    for name in _ELSEWHERE:
        device = value.get("device", "none") if isinstance(value := zero.get(name), Mapping) else value
        if device not in (None, False, "none"):
            return (
                f"with {name}: the trained tensors are then outside of the device, and a snapshot cannot restore them "
                "exactly. Turn offloading off, or use FSDPStrategy or ModelParallelStrategy"
            )
    for name, without in _OTHERWISE.items():
        if zero.get(name) and zero[name] != without:
            return f"with {name}, which was not tested. Turn it off, or use FSDPStrategy or ModelParallelStrategy"
    if precision.startswith("16") or (config.get("fp16") or {}).get("enabled"):
        return (
            f"with precision {precision!r}, because DeepSpeed itself sets the loss scale. Use precision='bf16-mixed', "
            "'bf16-true' or '32-true'"
        )
    return None


@final
class ZeroPartitions:
    """The partitions of a ZeRO optimizer, :class:`~lightning_nanguard.state.learner.Partitions`.

    Args:
        zero: DeepSpeed's optimizer.
        module: The module it trains.

    Attributes:
        optimizer: The torch optimizer that it wraps.

    Raises:
        ValueError: If it is another kind of optimizer.
    """

    def __init__(self, zero: Any, module: nn.Module) -> None:
        kind = type(zero).__name__
        missing = [name for name in _USED.get(kind, ()) if not hasattr(zero, name)]
        if kind not in _USED or missing:
            without = f" without {', '.join(missing)}" if missing else ""
            raise SettingsError(
                f"NaNGuard does not support DeepSpeed's {kind}{without}. Use ZeRO stage 1, 2 or 3 of DeepSpeed 0.19 "
                "without offloading, strategy='ddp', FSDPStrategy or ModelParallelStrategy, or remove the guard from "
                "the callbacks."
            )
        self._zero = zero
        self.optimizer: Optimizer = zero.optimizer
        self._module = module
        self._parted = kind == _PARTITIONED
        self._names = {id(parameter): name for name, parameter in module.named_parameters()}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's part of each parameter, and its partitions."""
        parameters: Iterator[tuple[str, Any]] = self._module.named_parameters()
        for name, parameter in parameters:
            yield name, parameter.ds_tensor if self._parted else parameter
        yield from self.stepped().items()

    def stepped(self) -> Mapping[str, Tensor]:
        """This rank's partitions."""
        zero = self._zero
        flat = zero.fp32_partitioned_groups_flat if self._parted else zero.single_partition_of_fp32_groups
        return {f"fp32_partition.{number}": tensor for number, tensor in enumerate(flat)}

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's part of each parameter's averaged gradient."""
        zero = self._zero
        groups = zero.fp16_groups if self._parted else zero.params_in_partition
        for number, found in zero.averaged_gradients.items():
            # The padding between them belongs to no parameter.
            own = [gradient for gradient in found or () if not getattr(gradient, "_zero_padding", False)]
            for parameter, gradient in zip(groups[number], own, strict=False):
                yield self._names.get(id(parameter), "a parameter"), gradient

    def restored(self) -> None:
        """Drop what is out of date after a restore: gathered parameters, and links to moments."""
        if self._parted:
            self._zero._partition_all_parameters()
        else:
            self._zero._hp_optimizer_states_linked = False

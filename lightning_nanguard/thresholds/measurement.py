"""Which way to measure is used when."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MeasurementThresholds:
    """Which way to measure is used when.

    On the CPU a call costs more than the arithmetic on a small tensor, so small tensors are copied into one before
    their norm is taken.

    Attributes:
        fewest_tensors_joined: Number of tensors from which small ones are joined. With fewer, the calls cost less than
            the copies.
        largest_tensor_joined: Elements of the largest tensor that is joined. To copy a larger one costs more than to
            measure it alone.
        tensors_per_join: Number of tensors that are joined at once. It limits the memory of the copy.
        updates_with_layer_norms: Newest updates whose gradient norms of each layer are kept. They are written at an
            incident, to show where it began.
    """

    fewest_tensors_joined: int = 100
    largest_tensor_joined: int = 4096
    tensors_per_join: int = 1024
    updates_with_layer_norms: int = 8

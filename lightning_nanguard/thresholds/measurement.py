"""Where one way to measure is cheaper than another, and how far a batch is looked into."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MeasurementThresholds:
    """Where one way to measure is cheaper than another, and how far a batch is looked into.

    On the CPU a call costs more than the arithmetic on a small tensor, so small tensors are copied into one before
    their norm is taken.

    Attributes:
        fewest_tensors_joined: Number of tensors from which on small ones are joined: with fewer, the calls cost less
            than the copies.
        largest_tensor_joined: Elements of the largest tensor that is joined: a larger one is dearer to copy than to
            measure by itself.
        tensors_per_join: Number of tensors that are joined at once, which bounds the memory of the copy.
        updates_with_layer_norms: Newest updates of which the norm of each layer is kept, to be written at an incident:
            enough to see where it began. They are numbers that are measured anyway.
        deepest_part: Levels down to which a batch is taken apart: an object may lead to a whole program.
        hashed_first: Numbers of each tensor of a sample, spread over it, that go into the first half of its hash. Of a
            batch in which samples are looked for only these are hashed, which takes about 0.1 ms.
        elements_at_once: Elements that are looked at one by one at a time, since the answers take memory.
    """

    fewest_tensors_joined: int = 100
    largest_tensor_joined: int = 4096
    tensors_per_join: int = 1024
    updates_with_layer_norms: int = 8
    deepest_part: int = 32
    hashed_first: int = 16
    elements_at_once: int = 1 << 24

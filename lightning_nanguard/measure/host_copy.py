"""Copies from the device to the host that nobody waits for until they are read."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor


@final
class HostCopy:
    """Brings a few numbers to the host without waiting for the device until they are read.

    Args:
        numbers: One-dimensional, on any device.
    """

    def __init__(self, numbers: Tensor) -> None:
        cuda = numbers.is_cuda
        self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=cuda)
        self._host.copy_(numbers, non_blocking=True)
        self._done: Any = None
        if cuda:
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record(torch.cuda.current_stream(numbers.device))

    def arrived(self) -> bool:
        """Whether :meth:`read` would not wait for the device."""
        return self._done is None or bool(self._done.query())

    def read(self) -> list[float]:
        """The numbers; waits until they are there."""
        if self._done is not None:
            self._done.synchronize()
        numbers: list[float] = self._host.tolist()
        return numbers

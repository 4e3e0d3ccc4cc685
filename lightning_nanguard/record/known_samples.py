"""Counts the bad samples of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from lightning_nanguard.types import Row

_HASH = "hash "


def hash_key(name: str) -> str:
    """The key of a sample without a row.

    Args:
        name: Its hash.
    """
    return f"{_HASH}{name}"


@final
class KnownSamples:
    """Counts how often each bad sample was found, in all fits of a run.

    Args:
        quarantine: Whether rows that are known to be bad are left out of later batches.

    Attributes:
        quarantine: Whether rows are left out.
        left_out: Rows that are left out of every batch drawn from now on.
        hashes: Hashes of samples without rows that are left out.

    Example:
        >>> known = KnownSamples(quarantine=True)
        >>> known.met(100), known.met(100), known.left_out
        (1, 2, {100})
    """

    def __init__(self, *, quarantine: bool = False) -> None:
        self.quarantine = quarantine
        self._times: dict[Row, int] = {}
        self.left_out: set[Row] = set()
        self.hashes: set[str] = set()

    def met(self, key: Row) -> int:
        """Count a sample; return how often it was found so far.

        Args:
            key: Its row, or the result of :func:`hash_key`.
        """
        times = self._times[key] = self._times.get(key, 0) + 1
        if self.quarantine:
            self._leave_out(key)
        return times

    def __len__(self) -> int:
        """Number of different samples found so far."""
        return len(self._times)

    def times(self, key: Row) -> int:
        """How often a sample was found so far."""
        return self._times.get(key, 0)

    def _leave_out(self, key: Row) -> None:
        if isinstance(key, str) and key.startswith(_HASH):
            self.hashes.add(key.removeprefix(_HASH))
        else:
            self.left_out.add(key)

    def state_dict(self) -> dict[str, Any]:
        """Plain containers."""
        return {"times": [[key, times] for key, times in self._times.items()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`. Checkpoints of earlier versions lack this state."""
        for key, times in state.get("times", ()):
            self._times[key] = int(times)
            if self.quarantine:
                self._leave_out(key)

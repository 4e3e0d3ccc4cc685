"""What the guard raises."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_nanguard.events import Fault, Finding


class TrainingDivergedError(RuntimeError):
    """The run cannot be helped; the last good weights are in the module.

    Attributes:
        fault: What was found, ``None`` when the run could not even start.
        reason: Why the guard gave up.
        tried: What it had done before, in words.
        snapshot_step: ``global_step`` of the state now in the module, ``None`` when there was none.
        finding: The cause, where one was found.
    """

    def __init__(
        self,
        message: str,
        *,
        fault: Fault | None = None,
        reason: str = "",
        tried: Sequence[str] = (),
        snapshot_step: int | None = None,
        finding: Finding | None = None,
    ) -> None:
        super().__init__(message)
        self.fault = fault
        self.reason = reason
        self.tried = tuple(tried)
        self.snapshot_step = snapshot_step
        self.finding = finding

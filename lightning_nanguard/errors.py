"""Errors the guard raises, and the check of arguments that every constructor uses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_nanguard.types import Fault, Finding


def require(condition: bool, owner: object, argument: str, value: object, expected: str) -> None:
    """Raise a ``ValueError`` that names the class, the argument, its value and what was expected.

    Args:
        condition: Whether the value is fine.
        owner: Whose argument it is: an instance, or the name of its class.
        argument: Name of the argument.
        value: What it was given.
        expected: What was expected, in words.
    """
    if not condition:
        name = owner if isinstance(owner, str) else type(owner).__name__
        raise ValueError(f"{name}({argument}={value!r}): expected {expected}.")


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


class BadCheckpointError(RuntimeError):
    """A run was not gone on with: its checkpoint is poisoned or torn.

    Attributes:
        path: The checkpoint.
        tensors: Names of the tensors in it that are not finite; empty where it cannot be read.
        offered: The newest good checkpoint near it, ``None`` where there is none.
    """

    def __init__(self, message: str, path: Path, tensors: Sequence[str] = (), offered: Path | None = None) -> None:
        super().__init__(message)
        self.path = path
        self.tensors = tuple(tensors)
        self.offered = offered

"""Errors the guard raises, and checks of arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from lightning_nanguard.types import Fault, Finding


class SettingsError(ValueError):
    """Raised when an argument of the guard is wrong, or does not fit the run."""


def require(condition: bool, owner: object, argument: str, value: object, expected: str) -> None:
    """Raise a :class:`SettingsError` that names the class, the argument, its value and what was expected.

    Args:
        condition: Whether the value is valid.
        owner: The object whose argument it is, or the name of its class.
        argument: Name of the argument.
        value: The value that was given.
        expected: What was expected, in words.
    """
    if not condition:
        name = owner if isinstance(owner, str) else type(owner).__name__
        raise SettingsError(f"{name}({argument}={value!r}): expected {expected}.")


def optional_module(name: str, needs: str, extra: str) -> ModuleType:
    """Import a module that only an extra of the package installs.

    Args:
        name: The module.
        needs: What needs which package, in words for the error.
        extra: The extra.

    Raises:
        ModuleNotFoundError: If it is not installed. The message names the extra.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{needs}, which is not installed: pip install 'lightning-nanguard[{extra}]'."
        ) from None


def takes_one_argument(function: Callable[..., Any]) -> bool:
    """Whether a user's function can be called with one argument."""
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        return False
    except ValueError:  # some functions written in C have no signature
        return True
    return True


class TrainingDivergedError(RuntimeError):
    """Raised when the guard cannot save the run. The module then has the last good weights.

    Attributes:
        fault: The fault that was found, ``None`` if the run could not start.
        reason: Why the guard gave up.
        tried: What the guard had done before, in words.
        snapshot_step: ``global_step`` of the state that is now in the module, ``None`` if there was no good state.
        finding: The cause, ``None`` if none was found.
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
    """Raised when a run would resume from a checkpoint that is poisoned (not finite) or torn (damaged).

    Attributes:
        path: The checkpoint.
        tensors: Names of the tensors in it that are not finite; empty if it cannot be read.
        offered: The newest good checkpoint of the same run, ``None`` if there is none.
    """

    def __init__(self, message: str, path: Path, tensors: Sequence[str] = (), offered: Path | None = None) -> None:
        super().__init__(message)
        self.path = path
        self.tensors = tuple(tensors)
        self.offered = offered


class DetectorTypeError(TypeError):
    """Raised when a detector returns an object of a wrong type."""


def has_to_be_raised(error: Exception, world_size: int) -> bool:
    """Whether an error in the guard ends the run: it is meant for the user, or other ranks would wait for this one.

    Args:
        error: The error.
        world_size: Number of processes.

    Example:
        >>> [has_to_be_raised(LookupError(), world_size) for world_size in (1, 2)]
        [False, True]
    """
    meant = (TrainingDivergedError, BadCheckpointError, SettingsError, DetectorTypeError)
    return world_size > 1 or isinstance(error, meant)

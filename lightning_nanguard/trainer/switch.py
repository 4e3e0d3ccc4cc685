"""The environment variable that switches every guard of a process."""

from __future__ import annotations

import os
from dataclasses import replace

from lightning_nanguard.trainer.arguments import Arguments
from lightning_nanguard.trainer.private.packages import rank_zero_info

VARIABLE = "NANGUARD"
"""Name of the environment variable: ``off`` for no guard, ``observe`` for guards that only observe."""


def switched(arguments: Arguments) -> Arguments | None:
    """A guard's arguments after the environment variable was applied; ``None`` if the guard is off.

    Args:
        arguments: The user's arguments.

    Raises:
        ValueError: If the environment variable has another value.
    """
    value = os.environ.get(VARIABLE, "").strip().lower() or "on"
    choices = ("on", "observe", "off")
    if value not in choices:
        raise ValueError(f"{VARIABLE}={value} in the environment: expected one of {', '.join(choices)}.")
    if value == "on":
        return arguments
    rank_zero_info(f"NaNGuard {'is off' if value == 'off' else 'only observes'}: {VARIABLE}={value} is set.")
    return replace(arguments, observe=True) if value == "observe" else None

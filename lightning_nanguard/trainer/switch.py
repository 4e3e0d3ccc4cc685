"""The environment variable that switches every guard of a process."""

from __future__ import annotations

import os
from typing import Literal, cast

VARIABLE = "NANGUARD"
"""Name of the environment variable."""

Switch = Literal["on", "observe", "off"]


def switch() -> Switch:
    """What the environment says: ``NANGUARD=off`` for no guard, ``NANGUARD=observe`` for guards that only observe.

    Raises:
        ValueError: When it says something else.
    """
    value = os.environ.get(VARIABLE, "").strip().lower() or "on"
    choices = ("on", "observe", "off")
    if value not in choices:
        raise ValueError(f"{VARIABLE}={value} in the environment: expected one of {', '.join(choices)}.")
    return cast("Switch", value)

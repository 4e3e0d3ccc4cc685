"""Finds the classes named on a command line."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any


def load(name: str) -> Any:
    """Import the object that ``package.file:Name`` or ``folder/file.py:Name`` stands for.

    Args:
        name: Where it is defined, a colon, and its name there.

    Raises:
        ValueError: If the name has no colon.
        FileNotFoundError: If there is no such file.
    """
    home, separator, attribute = name.rpartition(":")
    if not separator:
        raise ValueError(f"{name!r} names no class: write package.file:Class, or folder/file.py:Class.")
    if home.endswith(".py"):
        path = Path(home)
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {home}.")
        sys.path.insert(0, str(path.parent.resolve()))
        home = path.stem
    found: Any = importlib.import_module(home)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found

"""Finds the classes named on a command line."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from lightning_nanguard.record.text import joined
from lightning_nanguard.thresholds.fixed import NUMBERS_PER_MESSAGE


def load(name: str) -> Any:
    """Import the object that ``package.file:Name`` or ``folder/file.py:Name`` stands for.

    Raises:
        ValueError: If the name has no colon, or if it is not defined there. The message lists what is.
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
        if not hasattr(found, part):
            raise ValueError(f"{name.rpartition(':')[0]} has no class {attribute}{_defined_in(home)}.")
        found = getattr(found, part)
    return found


def _defined_in(module: str) -> str:
    """The classes and functions that a module defines, in words; empty if it defines none."""
    names = [
        name
        for name, one in vars(sys.modules[module]).items()
        if not name.startswith("_") and getattr(one, "__module__", None) == module and hasattr(one, "__qualname__")
    ]
    return f"; it has {joined(names, NUMBERS_PER_MESSAGE)}" if names else ""

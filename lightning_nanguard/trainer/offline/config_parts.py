"""Finds errors in the guard's entries of a LightningCLI configuration, with one line for each."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning_nanguard
from lightning_nanguard.trainer.never_called import hooks_called

_PACKAGE = "lightning_nanguard"


def wrong_parts(path: Path) -> list[str]:
    """Errors in the names, arguments and values of this package's classes in a configuration.

    LightningCLI also rejects them, but its message fills a screen.
    """
    try:
        config = import_module("yaml").safe_load(path.read_text(encoding="utf-8"))
    except ModuleNotFoundError:
        return []  # a later check reports the missing package
    return [*_wrong(config, "")]


def _wrong(value: Any, place: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        name = value.get("class_path")
        if isinstance(name, str) and name.partition(".")[0] == _PACKAGE:
            yield from _wrong_part(name, value.get("init_args") or {}, place)
        for key, item in value.items():
            yield from _wrong(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _wrong(item, f"{place}[{index}]")


def _wrong_part(name: str, given: Any, place: str) -> Iterator[str]:
    try:
        home, _, short = name.rpartition(".")
        part = getattr(import_module(home), short)
    except (ImportError, AttributeError):
        yield f"{place}: there is no {name}.{_meant(name.rpartition('.')[2], lightning_nanguard.__all__)}"
        return
    known = inspect.signature(part).parameters
    unknown = [key for key in given if key not in known] if isinstance(given, Mapping) else []
    for key in unknown:
        yield f"{place}: {short} has no argument {key!r}.{_meant(str(key), known)}"
    if not unknown and isinstance(given, Mapping):
        # Only plain values: nested objects are checked at their own entry.
        plain = {key: one for key, one in given.items() if not isinstance(one, (Mapping, list))}
        try:
            hooks_called(part(**plain))
        except (TypeError, ValueError) as error:
            yield f"{place}: {error}"


def _meant(name: str, known: Any) -> str:
    close = get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else f" There are: {', '.join(known)}."

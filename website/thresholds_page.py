"""Writes the page of all thresholds from the dataclasses in ``lightning_nanguard/thresholds``."""

from __future__ import annotations

import dataclasses
import inspect
import math
import pkgutil
import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import lightning_nanguard.thresholds as package
from lightning_nanguard.thresholds import Thresholds

HEAD = """# Thresholds

Every number that decides something is a field of a frozen dataclass. This page is made from the code. You rarely need
to change a threshold. To change one, give the guard your own `Thresholds`:

```python
from dataclasses import replace

from lightning_nanguard import NaNGuard, Thresholds

defaults = Thresholds()
guard = NaNGuard(thresholds=replace(defaults, trial=replace(defaults.trial, updates=96)))
```
"""

OTHERS = """## Outside of `Thresholds`

These belong to commands and to classes that you create yourself.
"""


def described(cls: type) -> dict[str, str]:
    """What the docstring of a dataclass says of each of its fields."""
    _, _, text = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", text, re.MULTILINE)
    return {name: " ".join(meaning.split()) for name, meaning in entries}


def classes() -> list[type]:
    """Every dataclass in the folder of thresholds."""
    modules = [import_module(f"{package.__name__}.{one.name}") for one in pkgutil.iter_modules(package.__path__)]
    found = [value for module in (package, *modules) for value in vars(module).values() if inspect.isclass(value)]
    return sorted({one for one in found if dataclasses.is_dataclass(one)}, key=lambda one: one.__name__)


def groups(default: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """A dataclass and all those that are its fields, each with the path that leads to it."""
    yield path, default
    for field in dataclasses.fields(default):
        value = getattr(default, field.name)
        if dataclasses.is_dataclass(value):
            yield from groups(value, f"{path}.{field.name}".lstrip("."))


def page() -> str:
    """The whole page."""
    tree = list(groups(Thresholds()))
    inside = {type(default) for _, default in tree}
    contained = {type(one) for cls in classes() for _, one in list(groups(cls()))[1:]}
    others = [cls for cls in classes() if cls not in inside and cls not in contained]
    parts = [HEAD, *(section(path, default) for path, default in tree[1:]), OTHERS if others else ""]
    parts += [section(path or cls.__name__, one) for cls in others for path, one in groups(cls())]
    return "\n".join(part for part in parts if part)


def section(path: str, default: Any) -> str:
    """One dataclass: what it is for, and a table of its fields."""
    cls = type(default)
    meaning = described(cls)
    head, _, _ = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")
    fields = [one for one in dataclasses.fields(cls) if not dataclasses.is_dataclass(getattr(default, one.name))]
    rows = [f"| `{one.name}` | {shown(getattr(default, one.name))} | {_cell(meaning[one.name])} |" for one in fields]
    table = ["| field | default | meaning and reason |", "|---|---|---|", *rows, ""] if rows else []
    level = "##" if "." not in path else "###"
    return "\n".join([f"{level} `{path}`", "", f"{_plain(head.strip())} (`{cls.__name__}`)", "", *table])


def shown(value: object) -> str:
    """A default as one would write it."""
    if isinstance(value, tuple):
        return ", ".join(shown(one) for one in value) or "–"
    if isinstance(value, float) and math.isfinite(value):
        return f"`{value:,.6g}`" if abs(value) < 1e6 else f"`{value:g}`"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"`{value:,}`"
    return f"`{value}`"


def _plain(text: str) -> str:
    return re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text).replace("``", "`")


def _cell(text: str) -> str:
    return _plain(text).replace("|", r"\|")

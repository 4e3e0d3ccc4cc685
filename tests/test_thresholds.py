"""Every number that decides something has a name, a reason and one home."""

from __future__ import annotations

import importlib
import pkgutil
import re
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from typing import Any

import pytest

from lightning_nanguard import thresholds

MODULES = [
    importlib.import_module(f"{thresholds.__name__}.{one.name}") for one in pkgutil.iter_modules(thresholds.__path__)
]
CLASSES = {
    value: f"{module.__name__.rpartition('.')[2]}.{name}"
    for module in [*MODULES, thresholds]
    for name, value in vars(module).items()
    if isinstance(value, type) and is_dataclass(value)
}


@pytest.mark.parametrize("kind", CLASSES, ids=CLASSES.values())
def test_every_field_has_a_default_and_a_line(kind: Any) -> None:
    """Each dataclass can be made without arguments, is frozen, and says of every field what is counted and why."""
    made = kind()
    described = set(re.findall(r"^\s+(\w+): ", (kind.__doc__ or "").partition("Attributes:")[2], re.MULTILINE))
    assert {field.name for field in fields(kind)} == described
    assert replace(made) == made
    for field in fields(kind)[:1]:
        with pytest.raises(FrozenInstanceError):
            setattr(made, field.name, getattr(made, field.name))


def test_all_of_them_hang_together() -> None:
    """Every topic is a part of the one object that is given to a guard."""

    def modules(made: Any) -> set[str]:
        inside = (
            {name for field in fields(made) for name in modules(getattr(made, field.name))}
            if is_dataclass(made)
            else set()
        )
        return inside | {type(made).__module__}

    # What `nanguard check` and the report use belongs to no guard, and fixed numbers cannot be set.
    others = {f"lightning_nanguard.thresholds.{name}" for name in ("check", "fixed", "report")}
    own = {module.__name__ for module in MODULES} - others
    assert modules(thresholds.Thresholds()) >= own

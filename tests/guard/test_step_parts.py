"""The parts of a guard that a loop needs to make a step again."""

from __future__ import annotations

import re
from dataclasses import fields
from inspect import getdoc

from lightning_nanguard.guard.step_parts import StepParts


def test_each_part_is_described() -> None:
    """The docstring says in a line of its own what each part does, in the order of the fields."""
    described = re.findall(r"^    (\w+): \S.*\.$", getdoc(StepParts) or "", re.MULTILINE)
    assert described == [one.name for one in fields(StepParts)]

"""The forms: every way of training at 5, 30 and 1,000 times its right rate, from the start and as a peak."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.rescue import faults
from benchmarks.rescue.cases import Drawn, Form, form
from benchmarks.rescue.models import Task

from . import generative, images, language, pairs, speech
from .rates import RATES

TASKS: dict[str, Task] = language.TASKS | images.TASKS | pairs.TASKS | speech.TASKS | generative.TASKS
"""What is learned, by what, from what; by name."""


def start(factor: float) -> Drawn:
    """``factor`` times the right rate, in all of the run."""
    return lambda room: faults.Rate(room.near(factor, 1.2))


def peak(factor: float) -> Drawn:
    """The same for 20 to 40 updates of the first half."""
    return lambda room: faults.Peak(
        room.near(factor, 1.2), int(room.steps * room.dice.uniform(0.15, 0.4)), room.dice.randint(20, 40)
    )


def realistic(label: str, spec: str, fault: Drawn | None, heading: str = "") -> Form:
    """A form on one of these tasks, at its right rate but for the fault."""
    made = form(label, spec, fault)
    options = made.options | {"own_task": TASKS[made.task], "heading": heading}
    return replace(made, rate=RATES[spec], options=options)


FACTORS = (5, 30, 1000)

REALISTIC: tuple[Form, ...] = tuple(
    realistic(f"{where}{factor}", spec, fault(factor), f"realistic, {where} x {factor}")
    for factor in FACTORS
    for where, fault in (("start", start), ("peak", peak))
    for spec in RATES
)
"""What fails."""

TWINS: tuple[Form, ...] = tuple(realistic("right", spec, None) for spec in RATES)
"""The same at the right rate, to be left alone."""

"""Finds the right rate of each way of training: ``python -m benchmarks.rescue.realistic.calibrate [REGEX]``.

Right is the lowest rate of :data:`GRID` that makes :data:`NEARLY` of the best rate's improvement of the held-out loss.
The search climbs from the rate that stands in the table, and prints lines for the table.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.rescue.cases import Form
from benchmarks.rescue.running import train

from .catalogue import TWINS

GRID = tuple(float(f"{digit}e{exponent}") for exponent in range(-5, 2) for digit in (1, 2, 5))


NEARLY = 0.98


def right_rate(form: Form, seed: int = 1) -> tuple[float, float]:
    """The right rate, and the improvement that it makes."""
    found: dict[int, float] = {}

    def improvement(i: int) -> float:
        if i not in found:
            run = train(replace(form.draw(seed), rate=GRID[i]))
            found[i] = run.initial - run.final if run.ended_well else -math.inf
        return found[i]

    best = climb(improvement, min(range(len(GRID)), key=lambda i: abs(math.log(GRID[i] / (form.rate or 1.0)))))
    right = min(i for i in found if found[i] >= NEARLY * found[best])
    return GRID[right], found[right]


def climb(improvement: Callable[[int], float], at: int) -> int:
    """Where ``improvement`` is largest, uphill from ``at``; it looks over one step that is no better."""
    while True:
        around = (i for i in (at + 1, at - 1, at + 2) if 0 <= i < len(GRID))
        better = next((i for i in around if improvement(i) > improvement(at)), None)
        if better is None:
            return at
        at = better


def main(pattern: str = "") -> None:
    """Print the table's lines."""
    torch.set_num_threads(1)
    for form in TWINS:
        if re.search(pattern, form.name):
            rate, gained = right_rate(form)
            print(f'    "{form.name.partition(":")[2]}": {rate:g},  # gains {gained:.3g}', flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

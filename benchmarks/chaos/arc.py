"""Puts the same draws to arc-training, in an environment of its own that ``make arc`` builds."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .running import Outcome

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class ArcOutcome:
    """How a draw went under arc-training.

    Attributes:
        cost: Share of the gain that the fault costs; 1 where the run does not end.
        error: What ended the run; empty where it reached its end.
        acted: Whether it did anything.
    """

    cost: float
    error: str
    acted: bool


def arc_outcomes(seed: int, found: Sequence[Outcome], python: str | None) -> dict[int, ArcOutcome]:
    """The draws under arc-training, by number; none where there is no such environment.

    Args:
        seed: That of the campaign.
        found: The draws to repeat.
        python: The interpreter of the environment.

    Raises:
        RuntimeError: When the environment does not train a draw to the same bits.
    """
    if not python:
        return {}
    asked = "".join(f"{one.number} {one.gain[0]!r} {one.gain[1]!r}\n" for one in found)
    command = [python, "-W", "ignore", "-m", "benchmarks.chaos.arc_worker", str(seed)]
    done = subprocess.run(
        command, cwd=ROOT, input=asked, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"arc-training's environment ended with {done.returncode}: {done.stdout[-500:]}")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    return {answer.pop("number"): ArcOutcome(**answer) for answer in answers}

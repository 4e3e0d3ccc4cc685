"""Trains one draw bare and under each contender, and judges."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, replace
from typing import Any, final

from benchmarks.rescue.cases import Case
from benchmarks.rescue.contenders import CONTENDERS, Attempt, Contender, attempt_with
from benchmarks.rescue.healthy import BY_NAME
from benchmarks.rescue.running import Trained, train
from lightning_nanguard import NaNGuard

from .judging import TWINS, is_harmed, is_healthy, is_touched
from .store import Outcome

MOST_ACTS = 12
"""Interventions that are kept in words; all are counted."""


@final
class GuardSetting(Contender):
    """``NaNGuard(act_on=…)``, no other argument given."""

    def __init__(self, act_on: str) -> None:
        self.name, self.title = act_on, f'act_on="{act_on}"'  # type: ignore[misc]

    def attempt(self, case: Case) -> Attempt:
        return attempt_with(NaNGuard(**self._arguments()), case)

    def _arguments(self) -> dict[str, Any]:
        return {"act_on": self.name} if "act_on" in inspect.signature(NaNGuard).parameters else {}


SETTINGS: dict[str, Contender] = {name: GuardSetting(name) for name in ("certain", "evidence")}
"""Both ways to use the guard."""

RIVALS: dict[str, Contender] = {name: c for name, c in CONTENDERS.items() if name not in ("bare", "nanguard")}
"""Other ways to live with NaN."""

EVERYONE: dict[str, Contender] = SETTINGS | RIVALS


@dataclass(frozen=True, slots=True)
class Job:
    """One draw, for one worker.

    Attributes:
        case: Form and seed.
        contenders: Whom to put to it.
    """

    case: str
    contenders: tuple[str, ...]


def draw(name: str) -> Case:
    """The case of that name.

    Raises:
        ValueError: When there is no such form, or no seed.
    """
    form, _, seed = name.rpartition("#")
    if form not in BY_NAME or not seed.isdigit():
        raise ValueError(f"{name!r} is no case; expected form#seed, such as {next(iter(BY_NAME))}#0")
    return BY_NAME[form].draw(int(seed))


def measure(job: Job) -> list[Outcome]:
    """Outcomes of the bare run and of every contender; of the bare run alone where it is not healthy."""
    case = draw(job.case)
    bare = train(case)
    healthy = is_healthy(bare, BY_NAME[case.form].least_gain)
    losses = {name: value if math.isfinite(value) else 0.0 for name, value in _losses(bare).items()}
    outcomes = [Outcome(case.name, "bare", healthy, error=_error(bare), **losses)]
    if healthy:
        outcomes += [compare(case, bare, name, EVERYONE[name].attempt(case)) for name in job.contenders]
    return outcomes


def compare(case: Case, bare: Trained, name: str, attempt: Attempt) -> Outcome:
    """What a contender made of a healthy run; reseeded twins are trained where it was touched."""
    run, count = attempt.run, len(attempt.interventions)
    identical = run.digest == bare.digest
    ended = run.error is None and not run.poisoned and math.isfinite(run.final)
    touched = is_touched(count, run.digest, bare.digest)
    twins = reseeded(case) if touched and run.final != bare.final else []
    return Outcome(
        case.name,
        name,
        healthy=True,
        identical=identical,
        interventions=count,
        acts=[
            [a.get("global_step"), a.get("fault"), "+".join(a["remedies"])] for a in attempt.interventions[:MOST_ACTS]
        ],
        repeated=run.calls - bare.calls,
        error=_error(run),
        ended=ended,
        initial=bare.initial,
        bare=bare.final,
        final=run.final if math.isfinite(run.final) else 0.0,
        twins=twins,
        harmed=touched and is_harmed(run.final, ended, bare.initial, bare.final, twins),
        time=round(run.cpu_seconds / bare.cpu_seconds, 3),
    )


def reseeded(case: Case, most: int = 3 * TWINS) -> list[float]:
    """Held-out losses of bare runs with other seeds that came to a finite end."""
    losses: list[float] = []
    for i in range(most):
        run = train(replace(case, seed=case.seed + 1000 + i))
        if run.error is None and not run.poisoned and math.isfinite(run.final):
            losses.append(run.final)
        if len(losses) == TWINS:
            break
    return losses


def _losses(bare: Trained) -> dict[str, float]:
    return {"initial": bare.initial, "bare": bare.final, "final": bare.final}


def _error(run: Trained) -> str | None:
    return None if run.error is None else ": ".join(run.error)[:200]

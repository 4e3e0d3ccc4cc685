"""Trains one draw bare and under each contender, and judges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.rescue.arc import Arc
from benchmarks.rescue.cases import Case
from benchmarks.rescue.contenders import RIVALS, SETTINGS, Attempt, Contender
from benchmarks.rescue.healthy import BY_NAME
from benchmarks.rescue.running import Trained, train

from .judging import TWINS, is_harmed, is_healthy, is_touched
from .store import Outcome

LOWER = (1 / 4, 1 / 16, 1 / 64)
"""Factors on the rate of a healthy run: if one of them ends far better, the rate of the run is too high."""

MOST_ACTS = 12
"""Interventions that are kept in words; all are counted."""


EVERYONE: dict[str, Contender] = SETTINGS | RIVALS | {Arc.name: Arc()}
"""Whom a draw can be put to, by name."""


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
    """Outcomes of the bare run and of every contender; of the bare run alone where it is not healthy.

    Every healthy draw is trained at lower rates, too. Reseeded twins are trained where a contender touched the run,
    once for all of them.
    """
    case = draw(job.case)
    bare = train(case)
    form = BY_NAME[case.form]
    healthy = is_healthy(bare, form.least_gain)
    # Where nothing can be learned, no rate is too high.
    lower = at_lower_rates(case) if healthy and form.kind != "noise" else []
    initial, final = (value if math.isfinite(value) else 0.0 for value in (bare.initial, bare.final))
    outcomes = [
        Outcome(case.name, "bare", healthy, error=_error(bare), initial=initial, bare=final, final=final, lower=lower)
    ]
    if healthy:
        attempts = {name: EVERYONE[name].attempt(case) for name in job.contenders}
        differ = any(attempt.run.final != bare.final for attempt in attempts.values())
        twins = reseeded(case) if differ else []
        outcomes += [compare(case.name, bare, name, attempt, twins, lower) for name, attempt in attempts.items()]
    return outcomes


def compare(
    case: str, bare: Trained, name: str, attempt: Attempt, twins: list[float], lower: Sequence[float] = ()
) -> Outcome:
    """What a contender made of a healthy run."""
    run, count = attempt.run, len(attempt.interventions)
    touched = is_touched(count, run.digest, bare.digest)
    acts = attempt.interventions[:MOST_ACTS]
    return Outcome(
        case,
        name,
        healthy=True,
        identical=run.digest == bare.digest,
        interventions=count,
        acts=[[act.get("global_step"), act.get("fault"), "+".join(act["remedies"])] for act in acts],
        repeated=run.calls - bare.calls,
        error=_error(run),
        ended=run.ended_well,
        initial=bare.initial,
        bare=bare.final,
        final=run.final if math.isfinite(run.final) else 0.0,
        twins=twins if touched else [],
        lower=[*lower] if touched else [],
        harmed=touched and is_harmed(run.final, run.ended_well, bare.initial, bare.final, twins),
        time=round(run.cpu_seconds / bare.cpu_seconds, 3),
    )


def reseeded(case: Case) -> list[float]:
    """Held-out losses of bare runs with other seeds that came to a finite end."""
    losses: list[float] = []
    for i in range(3 * TWINS):
        run = train(replace(case, seed=case.seed + 1000 + i))
        if run.ended_well:
            losses.append(run.final)
        if len(losses) == TWINS:
            break
    return losses


def at_lower_rates(case: Case) -> list[float]:
    """Held-out losses of the bare run at lower rates that came to a finite end."""
    runs = [train(replace(case, rate=case.rate * factor)) for factor in LOWER]
    return [run.final for run in runs if run.ended_well]


def _error(run: Trained) -> str | None:
    return None if run.error is None else ": ".join(run.error)[:200]

"""One run of the benchmark: what was said of it, and whether that is right."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

from .faulty import FAULTY
from .further import FURTHER
from .healthy import said_of
from .others import OTHERS, place_right
from .running import quiet, run
from .slow import SLOW

FORMS = {f"{form.cause}/{form.name}": form for form in (*FAULTY, *FURTHER, *SLOW)}


@dataclass(frozen=True, slots=True)
class Result:
    """What was said of one run.

    Attributes:
        form: Cause and name; exceptions are forms of their own, of any cause.
        seed: Its seed.
        cause: The right cause.
        said: The first-ranked cause, ``""`` for none.
        confidence: Of it.
        place: Whether the place is right; ``None`` where there is none to name.
        samples: Whether the samples are right; ``None`` where there are none to name.
        others: Whether each other tool names the place; ``None`` where there is none to name.
        text: The suggestion.
    """

    form: str
    seed: int
    cause: str
    said: str
    confidence: float
    place: bool | None
    samples: bool | None
    others: dict[str, bool | None]
    text: str


@dataclass(frozen=True, slots=True)
class Job:
    """One run to be made.

    Attributes:
        fails: Whether it is one of the failing forms, and not of the healthy ones.
        form: Name of the form.
        seed: Its seed.
    """

    fails: bool
    form: str
    seed: int


@dataclass(frozen=True, slots=True)
class Seen:
    """What came of a run.

    Attributes:
        job: Which.
        seconds: Processor time.
        result: Of a failing run.
        causes: What was said of a healthy one.
    """

    job: Job
    seconds: float
    result: Result | None = None
    causes: tuple[str, ...] = ()


def measure(job: Job) -> Seen:
    """Make one run."""
    started = time.process_time()
    if job.fails:
        result = failing((job.form, job.seed))
        return Seen(job, time.process_time() - started, result)
    causes = tuple(finding.cause for finding in said_of(job.form, job.seed))
    return Seen(job, time.process_time() - started, None, causes)


def failing(job: tuple[str, int]) -> Result:
    """Run one problem under the guard and under the others."""
    name, seed = job
    form = FORMS[name]
    problem = form.draw(seed)
    finding = run(problem).finding
    cause = "" if finding is None else finding.cause
    place = samples = None
    if problem.place:
        place = finding is not None and re.search(problem.place, finding.place) is not None
    if problem.samples is not None:
        samples = finding is not None and finding.samples == problem.samples
    others: dict[str, bool | None] = dict.fromkeys(OTHERS)
    if problem.place and problem.look == "fit":
        for tool, say in OTHERS.items():
            with quiet():
                again = form.draw(seed)
                others[tool] = place_right(again, say(again))
    confidence, text = (0.0, "") if finding is None else (finding.confidence, finding.suggestion)
    return Result(name, seed, problem.cause, cause, confidence, place, samples, others, text)

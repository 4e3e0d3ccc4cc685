"""Puts contenders to a case and judges what they made of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import parent_process
from typing import Any

import torch

from .ablation import EVERYONE
from .cases import FAILING, HEALTHY, Case, Form
from .contenders import SETTINGS, Attempt
from .ranks import on_ranks
from .realistic.catalogue import REALISTIC, TWINS
from .running import Trained, train

REGAINED = 0.9
"""Share of the twin's improvement from which on a run counts as rescued."""

STILL_FAILS = 0.8
"""A finite bare run that keeps more than this is neither saved nor failing, and another is drawn."""

REGAINED_DATA = 0.98
"""The same where only samples were bad."""

NOT_A_NUMBER_WORDS = ("nan", "inf", "finite")


@dataclass(frozen=True, slots=True)
class Job:
    """One draw of one form, for one worker.

    Attributes:
        form: Name of the form.
        seeds: Seeds to try in turn until a draw fails without help; a healthy form takes the first.
        contenders: Whom to put to it.
        processes: Ranks of each run.
    """

    form: str
    seeds: tuple[int, ...]
    contenders: tuple[str, ...]
    processes: int = 1

    def draw(self, seed: int) -> Case:
        """The case of a seed."""
        return replace(FORMS[self.form].draw(seed), processes=self.processes)


@dataclass(slots=True)
class Verdict:
    """What one contender made of one case.

    Attributes:
        contender: Its name.
        rescued: Whether the run counts as saved; of a healthy run, whether it is bit-identical to the bare one.
        regained: Share of the twin's improvement of the held-out loss.
        within_spread: Whether the held-out loss is no worse than that of twins with other seeds; ``None`` if not asked.
        interventions: How often it stepped in.
        acts: What it did.
        steps_lost: Updates thrown away, ``None`` where it is not known.
        time: Wall time over the twin's.
        cpu_time: Processor time over the twin's.
        error: What ended fit.
        poisoned: Tensors that are not finite.
        final: Held-out loss in the end.
        losses: Training loss of each batch, a tenth of them.
        applies: Whether the contender's rule can be used here at all.
    """

    contender: str
    rescued: bool
    regained: float
    within_spread: bool | None
    interventions: int
    acts: list[dict[str, Any]]
    steps_lost: int | None
    time: float
    cpu_time: float
    error: tuple[str, str] | None
    poisoned: tuple[str, ...]
    final: float
    losses: list[float]
    applies: bool = True


@dataclass(slots=True)
class Result:
    """One case and everyone's verdict on it.

    Attributes:
        case: Its name.
        group: Heading in the report.
        fails: Whether the case fails without help (never of a healthy one).
        learns: Whether its twin learns.
        harms_data: Whether samples are at fault.
        description: All of the case, in words.
        initial: Held-out loss of the untrained twin.
        twin: Held-out loss of the trained twin.
        seconds: Wall time of the twin.
        verdicts: By contender.
        survivors: Draws that were set aside because they survive without help, and the guard's verdict on each.
    """

    case: str
    group: str
    fails: bool
    learns: bool
    harms_data: bool
    description: str
    initial: float
    twin: float
    seconds: float
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    survivors: list[tuple[str, Verdict | None]] = field(default_factory=list)


FORMS: dict[str, Form] = {f.name: f for f in (*FAILING, *HEALTHY, *REALISTIC, *TWINS)}


def prepare() -> None:
    """Make a worker ready: one thread, everything imported and warm."""
    torch.set_num_threads(1)
    if parent_process() is not None:  # of this process others would see it
        torch.set_flush_denormal(True)  # saturated recurrent nets make numbers that take twenty times as long
    for name in ("plain:linear/sgd", "plain:mlp/adam"):
        train(replace(FORMS[name].draw(0), steps=20))


def measure(job: Job) -> Result:
    """Train twin, bare run and every contender on one case."""
    return _healthy(job.draw(job.seeds[0]), job) if FORMS[job.form].fault is None else _failing(job)


def judge(case: Case, attempt: Attempt, name: str, twin: Trained) -> Verdict:
    """Whether the end state is that of a saved run."""
    run = attempt.run
    regained = (twin.initial - run.final) / (twin.initial - twin.final) if twin.initial != twin.final else math.nan
    if not math.isfinite(regained):
        regained = -math.inf
    ended_well = run.error is None and not run.poisoned
    rescued = ended_well and regained >= REGAINED if case.savable else _said_so(run)
    return Verdict(
        name, rescued, regained, None, len(attempt.interventions), attempt.interventions, attempt.steps_lost,
        run.seconds / twin.seconds, run.cpu_seconds / twin.cpu_seconds, run.error, run.poisoned, run.final,
        run.losses[:: max(1, len(run.losses) // 40)], attempt.applies,
    )  # fmt: skip


def _said_so(run: Trained) -> bool:
    """A clear error that names what is wrong, with no weight made worse."""
    if run.error is None or run.error[0] != "TrainingDivergedError":
        return False
    return not run.poisoned and any(word in run.error[1].lower() for word in NOT_A_NUMBER_WORDS)


def learns(twin: Trained) -> bool:
    """Whether the held-out loss falls clearly."""
    return twin.ended_well and twin.initial - twin.final > 0.1 * abs(twin.initial)


def _trained(case: Case) -> Trained:
    return on_ranks(case, lambda: train(case))


def _attempt(name: str, case: Case) -> Attempt:
    return on_ranks(case, lambda: EVERYONE[name].attempt(case))


def _failing(job: Job) -> Result:
    survivors: list[tuple[str, Verdict | None]] = []
    for seed in job.seeds:
        case = job.draw(seed)
        twin, tried = _trained(case.twin), _attempt("bare", case)
        bare, verdict = tried.run, judge(case, tried, "bare", twin)
        fails = not verdict.rescued and (bool(bare.error or bare.poisoned) or verdict.regained < STILL_FAILS)
        if fails and (learns(twin) or not case.savable):
            break
        if not fails:
            guard = verdict.rescued and "evidence" in job.contenders and not survivors
            kept = judge(case, _attempt("evidence", case), "evidence", twin) if guard else None
            survivors.append((case.name, kept))
    result = _result(case, twin, fails, survivors)
    for name in job.contenders:
        if name == "bare":
            result.verdicts[name] = verdict
            continue
        if not fails:
            continue
        result.verdicts[name] = judge(case, _attempt(name, case), name, twin)
    short = [v for n, v in result.verdicts.items() if n in SETTINGS and v.regained < REGAINED_DATA]
    if short and result.harms_data:
        worst = max(t.final for t in _other_twins(case))
        for guarded in short:
            guarded.within_spread = guarded.final <= worst
    return result


def _other_twins(case: Case, count: int = 4) -> list[Trained]:
    return [_trained(replace(case.twin, seed=case.seed + 1000 + i)) for i in range(count)]


def _healthy(case: Case, job: Job) -> Result:
    bare = _trained(case)
    result = _result(case, bare, False, [])
    for name in job.contenders:
        attempt = Attempt(bare) if name == "bare" else _attempt(name, case)
        verdict = judge(case, attempt, name, bare)
        verdict.rescued = attempt.run.digest == bare.digest
        result.verdicts[name] = verdict
    return result


def _result(case: Case, twin: Trained, fails: bool, survivors: list[tuple[str, Verdict | None]]) -> Result:
    harms_data = case.fault is not None and case.fault.harms_data
    return Result(
        case.name, case.group, fails, learns(twin), harms_data, repr(case), twin.initial, twin.final, twin.seconds,
        {}, survivors,
    )  # fmt: skip


def jobs(
    failing: Sequence[Form],
    healthy: Sequence[Form],
    draws: int,
    first: int,
    names: Sequence[str],
    processes: int = 1,
) -> list[Job]:
    """``draws`` of the failing forms in turn, and every healthy form once, with seeds from ``first`` on."""
    contenders = tuple(names)
    made = [
        Job(form.name, tuple(first + 10 * (i // len(failing)) + k for k in range(5)), contenders, processes)
        for i, form in ((i, failing[i % len(failing)]) for i in range(draws if failing else 0))
    ]
    return made + [Job(form.name, (first,), contenders, processes) for form in healthy]

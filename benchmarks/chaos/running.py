"""Trains a draw as it is, without its fault, and under a guard, and checks what the guard promises."""

from __future__ import annotations

import gc
import re
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.transient.running import quiet
from lightning_nanguard import NaNGuard
from lightning_nanguard.record.files import RECORDS_FILE, read_records
from lightning_nanguard.types import Intervention

from .draws import Draw, draw
from .injector import Injector
from .observing import census
from .training import Left, cost, train

COSTLY = 0.02
"""Share of the gain from which on a fault costs something."""

WITHOUT_LOSS = frozenset({"skip", "leave out", "redo", "restore", "transient"})
"""Remedies after which the end of a run is known to the bit, where each restore comes with a redo."""

SKIPS = frozenset({"skip", "leave out"})
"""Remedies that keep a batch, or a part of a window, from the weights."""

LEARNED = ("weights", "buffers", "optimizer", "further optimizers", "averages", "average weights")
"""Parts of what a run has left that it has learned."""

SEEN_MEANWHILE = ("logged", "rows", "metrics", "progress")
"""What may hold values of bad state until that was noticed, or is logged again without them."""


@dataclass(frozen=True)
class Outcome:
    """How a draw went.

    Attributes:
        number: Its number.
        one: The draw.
        hits: How often it was struck.
        wrong: In words, what does not hold.
        records: What the guard did.
        acted: Whether it did anything to the run.
        changed: Whether the learner ends neither as without the guard nor as without the fault, bit for bit.
        advice: Causes of advice that the guard gives, and does not give in the run without the fault.
        skipped: Whether a GradScaler, which needs no guard, kept the fault from the weights.
        learns: Whether the run without the fault learns enough for a cost to be told.
        bare: Share of the gain that the fault costs without a guard; 1 where the run does not end.
        guarded: The same with the guard.
        error: What ended the guarded run; empty where it reached its end.
        bare_error: The same without a guard.
        gain: Held-out loss of the run without the fault, before and after it.
    """

    number: int
    one: Draw
    hits: int
    wrong: tuple[str, ...]
    records: tuple[str, ...]
    acted: bool
    changed: bool
    advice: tuple[str, ...]
    skipped: bool
    learns: bool
    bare: float
    guarded: float
    error: str
    bare_error: str
    gain: tuple[float, float]

    @property
    def costly(self) -> bool:
        """Whether the fault costs part of the gain without a guard."""
        return self.bare > COSTLY

    @property
    def fate(self) -> str:
        """What became of the fault: acted on, told, skipped by the GradScaler, or unseen."""
        if self.acted:
            return "acted on"
        if self.records or self.advice:
            return "told"
        return "skipped" if self.skipped else "unseen"


def outcome(job: tuple[int, int]) -> Outcome:
    """Run a draw.

    Args:
        job: The seed of the campaign, and the draw's number.
    """
    torch.set_num_threads(1)
    seed, number = job
    one = draw(seed, number)
    with quiet(), tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder = Path(name)
        twin = train(one, Injector(None), folder / "twin")
        bare = train(one, Injector(one), folder / "bare")
        for left in (twin, bare):
            left.objects.clear()
        guard = _guard(one, folder / "records")
        before = census()
        guarded = train(one, Injector(one), folder / "guarded", guard, records=lambda: guard.interventions)
        wrong = [*_leftovers(before, bare, guarded), *_broken(one, twin, bare, guarded, guard)]
        wrong += _records_wrong(guard, folder / "records")
        advice = _advice(one, guard, folder)
        if _known_to_the_bit(one, guard.interventions, guarded):
            only = len(guard.interventions) == 1
            left_out = _left_out(one, guard.interventions)
            wrong += _as_expected(one, twin, guarded, folder / "expected", left_out=left_out, only=only)
    return Outcome(
        number=number,
        one=one,
        hits=guarded.hits,
        wrong=tuple(wrong),
        records=tuple(f"{made.fault} at {made.place}: {', '.join(made.remedies)}" for made in guard.interventions),
        acted=any(made.remedies for made in guard.interventions),
        changed=all([*_different(other, guarded, "", only=LEARNED)] for other in (twin, bare)),
        advice=advice,
        skipped=_scaler_skips(one, twin, bare),
        learns=twin.initial - twin.final > 0.05 * abs(twin.initial),
        bare=_cost(twin, bare),
        guarded=_cost(twin, guarded),
        error=guarded.error,
        bare_error=bare.error,
        gain=(twin.initial, twin.final),
    )


def _guard(one: Draw, folder: Path) -> NaNGuard:
    return NaNGuard(
        snapshot_every_n_steps=one.every,
        readback=one.readback,  # type: ignore[arg-type]
        act_on=one.act_on,  # type: ignore[arg-type]
        dirpath=folder,
        last_good_every_n_steps=6 if "last good" in one.companions else None,
    )


def _advice(one: Draw, guard: NaNGuard, folder: Path) -> tuple[str, ...]:
    """Causes and places of advice that the guard gives only with the fault."""
    given = dict.fromkeys(f"{made.finding.cause} at {made.finding.place}" for made in guard.advice)
    if not given:
        return ()
    calm = _guard(one, folder / "calm records")
    train(one, Injector(None), folder / "calm", calm, records=lambda: calm.interventions)
    usual = {f"{made.finding.cause} at {made.finding.place}" for made in calm.advice}
    return tuple(advice for advice in given if advice not in usual)


def _scaler_skips(one: Draw, twin: Left, bare: Left) -> bool:
    """Whether the update of the fault changes no weight under a GradScaler, and does without the fault."""
    end = one.at // one.accumulate * one.accumulate + one.accumulate - 1
    if one.precision != "fp16" or not one.batches or not 0 < end < len(bare.observer.weights):
        return False
    mine, calm = bare.observer.weights, twin.observer.weights
    return mine[end] == mine[end - 1] and calm[end] != calm[end - 1]


def _cost(twin: Left, left: Left) -> float:
    return 1.0 if left.error else cost(twin.initial, left.final, twin.final)


def _known_to_the_bit(one: Draw, records: Sequence[Any], guarded: Left) -> bool:
    """Whether the end of the guarded run follows from that of a run without the fault, or without the batch."""
    if (
        not any(record.remedies for record in records)
        or guarded.error
        or one.precision == "fp16"
        or "early stopping" in one.companions
    ):
        return False
    for record in records:
        remedies = set(record.remedies)
        if not remedies <= WITHOUT_LOSS or ("restore" in remedies and "redo" not in remedies):
            return False
        if SKIPS & remedies and (not one.batches or (one.mode == "two optimizers" and one.kind != "loss")):
            return False
    return one.kind != "rate"


def _left_out(one: Draw, records: Sequence[Intervention]) -> tuple[int, ...]:
    """Numbers of the batches that were not learned from: one, or a whole window if its update was skipped."""
    if any("skip" in record.remedies for record in records):
        first = one.at - one.at % one.accumulate
        return tuple(range(first, first + one.accumulate))
    return one.batches if any(SKIPS & set(record.remedies) for record in records) else ()


def _as_expected(
    one: Draw, twin: Left, guarded: Left, folder: Path, *, left_out: tuple[int, ...], only: bool
) -> Iterator[str]:
    expected, what = twin, "the run without the fault"
    if left_out:
        expected, what = train(one, Injector(None), folder, left_out=left_out), "the run without the batch"
    elif one.moment == "after" and only and [*_different(twin, guarded, what, but=SEEN_MEANWHILE)]:
        # One rollback may undo both. If not, what struck later may be nothing that anybody can tell from good numbers.
        second = replace(one, moment="any")
        expected, what = train(second, Injector(second), folder), "the run with the second fault alone"
    yield from _different(expected, guarded, what, but=SEEN_MEANWHILE)


def _different(
    expected: Left, left: Left, what: str, *, but: tuple[str, ...] = (), only: tuple[str, ...] = ()
) -> Iterator[str]:
    names = sorted({*expected.ended, *left.ended})
    different = [name for name in names if expected.ended.get(name) != left.ended.get(name)]
    different = [name for name in different if name.split("/")[1] not in but]
    different = [name for name in different if not only or name.split("/")[1] in only]
    if different:
        yield f"it does not end as {what}: {', '.join(different[:4])} differ"


def _broken(one: Draw, twin: Left, bare: Left, guarded: Left, guard: NaNGuard) -> Iterator[str]:
    stopped = guarded.error.startswith("TrainingDivergedError")
    # Some combinations raise without a fault, too, such as SWA over batch norm with a GradScaler.
    # Without the guard the run may have ended before the exception of the draw.
    struck = f"{one.value}: struck" if one.kind == "exception" else ""
    if guarded.error and not stopped and guarded.error not in (bare.error, twin.error, struck):
        yield f"it raised {guarded.error}"
    if one.kind == "exception" and bare.error and guarded.error != bare.error:
        yield f"{bare.error} came out as {guarded.error or 'nothing'}"
    if stopped and not bare.error and not bare.not_finite and _cost(twin, bare) <= COSTLY:
        yield f"it was stopped, which it is not without the guard: {guarded.error}"
    if guarded.not_finite:
        yield f"not finite in the end: {', '.join(guarded.not_finite[:4])}"
    if guarded.bad_files:
        yield f"not finite in files: {', '.join(guarded.bad_files[:4])}"
    if not any(record.remedies for record in guard.interventions) and guarded.error == bare.error:
        yield from _different(bare, guarded, "the run without a guard, though nothing was done")
    if one.kind == "none" and guard.interventions:
        yield "something was done in a healthy run"
    yield from guarded.observer.wrong
    alone = {remedy for record in guard.interventions for remedy in record.remedies} == {"restore averages"}
    if alone and one.kind == "average" and guarded.observer.weights != twin.observer.weights:
        yield "averages alone were put back, and the weights are not those of the run without the fault"
    yield from _clock_wrong(one, twin, guarded)
    # A scaler skips by itself; a rate or a loss may be next to nothing.
    if one.precision != "fp16" and one.kind != "rate" and one.value not in ("subnormal", "bit"):
        yield from _unrecorded((twin, bare), guarded)
    named = re.search(r"holds the weights of step (\d+)", guarded.error)
    if named and (after := guarded.observer.after.get(int(named[1]))) is not None and guarded.last != after:
        yield f"it says that the module holds the weights of step {named[1]}, which it does not"


def _clock_wrong(one: Draw, twin: Left, guarded: Left) -> Iterator[str]:
    clock = guarded.observer.clock
    for index, (now, then) in enumerate(zip(clock[1:], clock, strict=False)):
        if now[0] < then[0] or now[1] < then[1] or any(a < b for a, b in zip(now[3:], then[3:], strict=True)):
            yield f"the clock goes from {then} to {now} after batch {index + 1}"
    ends_early = guarded.error or "early stopping" in one.companions or one.precision == "fp16"
    if not ends_early and clock != twin.observer.clock:
        yield f"the clock ends at {clock[-1:]}, without the fault at {twin.observer.clock[-1:]}"


def _unrecorded(others: Sequence[Left], guarded: Left) -> Iterator[str]:
    """Updates that left the weights as they were before, or as they were earlier, without a record."""
    mine, told, seen = guarded.observer.weights, guarded.observer.told, set[str]()
    # Some updates change no weight without the guard, either.
    unguarded = [other.observer.weights for other in others]
    still = {index for states in unguarded for index, state in enumerate(states) if state in states[:index]}
    for index, state in enumerate(mine):
        known_before = told[index - 1] if index else 0
        stays = state in seen and index not in still and guarded.observer.moves[index]
        if stays and not guarded.error and told[min(len(told) - 1, index + 3)] == known_before:
            yield f"batch {index} changed no weight, or took them back, and nothing is on record"
        seen.add(state)


def _records_wrong(guard: NaNGuard, folder: Path) -> Iterator[str]:
    path = folder / RECORDS_FILE
    written = read_records(path) if path.exists() else []
    if [record.to_dict() for record in written] != [record.to_dict() for record in guard.interventions]:
        yield f"{len(written)} records are in the file, {len(guard.interventions)} in memory, or they differ"
    steps = [record.global_step for record in written]
    if steps != sorted(steps):
        yield f"records are not in order: {steps}"


def _leftovers(before: Mapping[str, Any], bare: Left, guarded: Left) -> Iterator[str]:
    alive = [weakref.ref(one) for one in guarded.objects]
    names = [type(one).__name__ for one in guarded.objects]
    guarded.objects.clear()
    gc.collect()
    kept = [name for name, one in zip(names, alive, strict=True) if one() is not None]
    if kept:
        yield f"the guard keeps {', '.join(kept)} alive"
    after = census()
    for name in sorted({*before, *after}):
        if before.get(name) != after.get(name):
            yield f"of the process differs {name}: {before.get(name)} before, {after.get(name)} after"
    if guarded.temporary:
        yield f"temporary files are left: {guarded.temporary}"
    if guarded.error == bare.error and guarded.attributes != bare.attributes:
        different = [key for key in guarded.attributes if guarded.attributes[key] != bare.attributes.get(key)]
        yield f"attributes or hooks are left: {', '.join(different)}"

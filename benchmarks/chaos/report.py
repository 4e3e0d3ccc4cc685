"""Tables of a campaign: what holds, which costly faults go unseen, and which harmless ones are acted on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .arc import ArcOutcome
from .draws import KINDS
from .running import COSTLY, Outcome


def told(found: Sequence[Outcome]) -> list[Outcome]:
    """The runs of which a cost can be told: they were struck by numbers, and learn without the fault."""
    return [one for one in found if one.hits and one.learns and one.one.kind not in ("exception", "none")]


def table(found: Sequence[Outcome], arc: Mapping[int, ArcOutcome]) -> str:
    """A row for each contender: what it made of faults that cost part of the gain, and of those that do not."""
    head = "| contender | costly | regained 98 % | 90 % | ended by an error | harmless | acted on | made worse |"
    lines = [head, "|---|--:|--:|--:|--:|--:|--:|--:|"]
    mine = told(found)
    rows: dict[str, list[tuple[Outcome, float, str, bool]]] = {
        "no guard": [(one, one.bare, one.bare_error, False) for one in mine],
        "act_on certain": [(one, one.guarded, one.error, one.acted) for one in mine if one.one.act_on == "certain"],
        "act_on evidence": [(one, one.guarded, one.error, one.acted) for one in mine if one.one.act_on == "evidence"],
    }
    if arc:
        rows["arc-training"] = [
            (one, arc[one.number].cost, arc[one.number].error, arc[one.number].acted)
            for one in mine
            if one.number in arc
        ]
    for name, runs in rows.items():
        costly = [run for run in runs if run[0].costly]
        harmless = [run for run in runs if not run[0].costly]
        regained = " | ".join(str(sum(cost <= most for _, cost, _, _ in costly)) for most in (COSTLY, 5 * COSTLY))
        ended = sum(bool(error) for _, _, error, _ in runs)
        acted = sum(acted for _, _, _, acted in harmless)
        worse = sum(cost > COSTLY for _, cost, _, _ in harmless)
        lines.append(f"| {name} | {len(costly)} | {regained} | {ended} | {len(harmless)} | {acted} | {worse} |")
    return "\n".join(lines)


def coverage(seed: int, found: Sequence[Outcome]) -> str:
    """For each kind of fault, how many cost part of the gain and were not acted on, and the reverse."""
    lines = [
        "",
        "| fault | runs | wrong | costly | of them unseen | harmless | of them acted on |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for kind in (*KINDS, "all"):
        runs = [one for one in found if kind in (one.one.kind, "all")]
        mine = told(runs)
        costly, harmless = [one for one in mine if one.costly], [one for one in mine if not one.costly]
        unseen, acted = sum(one.unseen for one in costly), sum(one.acted for one in harmless)
        wrong = sum(bool(one.wrong) for one in runs)
        lines.append(f"| {kind} | {len(runs)} | {wrong} | {len(costly)} | {unseen} | {len(harmless)} | {acted} |")
    return "\n".join([*lines, "", *_named(seed, found)])


def _named(seed: int, found: Sequence[Outcome]) -> Iterator[str]:
    for one in told(found):
        what = f"unseen, costs {one.guarded:.0%}" if one.unseen else ""
        if one.acted and not one.costly:
            costs = f"costs {one.guarded:.1%} with the guard and {one.bare:.1%} without"
            what = f"acted on ({'; '.join(one.records[:2])}), {costs}"
        if what:
            run, where = one.one, f"--seed {seed} --only {one.number}"
            yield f"{where}  # {run.kind} {run.value}, {run.moment}, {run.optimizer}, act_on {run.act_on}: {what}"


def figures(seed: int, found: Sequence[Outcome], arc: Mapping[int, ArcOutcome]) -> dict[str, Any]:
    """What the documents name."""
    mine = told(found)
    costly, harmless = [one for one in mine if one.costly], [one for one in mine if not one.costly]
    return {
        "seed": seed,
        "runs": len(found),
        "struck": sum(bool(one.hits) for one in found),
        "wrong": [{"number": one.number, "what": list(one.wrong)} for one in found if one.wrong],
        "costly": len(costly),
        "costly and unseen": sum(one.unseen for one in costly),
        "harmless": len(harmless),
        "harmless and acted on": sum(one.acted for one in harmless),
        "table": table(found, arc).splitlines(),
        "coverage": coverage(seed, found).strip().splitlines(),
    }

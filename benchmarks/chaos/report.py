"""Tables of a campaign: what holds, which costly faults go unseen, and which harmless ones change a run."""

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


FATES = ("acted on", "told", "skipped", "unseen")


def coverage(seed: int, found: Sequence[Outcome]) -> str:
    """For each kind of fault, what became of those that cost part of the gain, and whether others were acted on."""
    lines = [
        "",
        f"| fault | runs | wrong | costly | {' | '.join(FATES)} | harmless | acted on | changed | made worse |",
        "|---" + 11 * "|--:" + "|",
    ]
    for kind in (*KINDS, "all"):
        runs = [one for one in found if kind in (one.one.kind, "all")]
        costly, harmless = _parted(runs)
        cells = [len(runs), sum(bool(one.wrong) for one in runs), len(costly)]
        cells += [sum(one.fate == fate for one in costly) for fate in FATES]
        cells += [len(harmless), *_touched(harmless)]
        lines.append(f"| {kind} | {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, "", *_named(seed, found)])


def _parted(found: Sequence[Outcome]) -> tuple[list[Outcome], list[Outcome]]:
    """The runs whose fault costs part of the gain, and those whose fault does not."""
    mine = told(found)
    return [one for one in mine if one.costly], [one for one in mine if not one.costly]


def _touched(harmless: Sequence[Outcome]) -> tuple[int, int, int]:
    """How many harmless faults the guard acted on, how many of these ends it changed, and how many runs lost by it."""
    return (
        sum(one.acted for one in harmless),
        sum(one.acted and one.changed for one in harmless),
        sum(one.guarded > COSTLY for one in harmless),
    )


def _named(seed: int, found: Sequence[Outcome]) -> Iterator[str]:
    for one in told(found):
        what = ""
        if one.costly and not one.acted:
            advice = f" ({'; '.join((*one.records, *one.advice))})" if one.fate == "told" else ""
            what = f"{one.fate}{advice}, costs {one.guarded:.0%}"
        elif one.acted and one.changed and not one.costly:
            costs = f"costs {one.guarded:.1%} with the guard and {one.bare:.1%} without"
            what = f"changed ({'; '.join(one.records[:2])}), {costs}"
        if what:
            run, where = one.one, f"--seed {seed} --only {one.number}"
            yield f"{where}  # {run.kind} {run.value}, {run.moment}, {run.optimizer}, act_on {run.act_on}: {what}"


def figures(seed: int, found: Sequence[Outcome], arc: Mapping[int, ArcOutcome]) -> dict[str, Any]:
    """What the documents name."""
    costly, harmless = _parted(found)
    acted, changed, worse = _touched(harmless)
    return {
        "seed": seed,
        "runs": len(found),
        "struck": sum(bool(one.hits) for one in found),
        "wrong": [{"number": one.number, "what": list(one.wrong)} for one in found if one.wrong],
        "costly": len(costly),
        **{f"costly and {fate}": sum(one.fate == fate for one in costly) for fate in FATES},
        "harmless": len(harmless),
        "harmless and acted on": acted,
        "harmless and changed": changed,
        "harmless and made worse": worse,
        "table": table(found, arc).splitlines(),
        "coverage": coverage(seed, found).strip().splitlines(),
    }

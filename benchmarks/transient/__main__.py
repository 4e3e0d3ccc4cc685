"""Strikes runs with one transient fault each: ``python -m benchmarks.transient --seed K --runs N``."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.processes import results

from .draws import KINDS
from .running import Outcome, outcome


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign; gives 1 if fewer runs than wanted ended as without their fault."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transient", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="what is drawn")
    parser.add_argument("--runs", type=int, default=500, help="runs drawn")
    parser.add_argument("--only", type=int, help="number of the one run to make")
    parser.add_argument("--readback", choices=("step", "deferred"), default="step", help="when readings are read")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument(
        "--wanted",
        type=float,
        default=0.99,
        help="least share of the last column",
    )
    parser.add_argument("--output", type=Path, help="where figures go, as JSON")
    given = parser.parse_args(arguments)
    numbers = range(given.runs) if given.only is None else [given.only]
    found: list[Outcome] = []
    for one in results(outcome, [(given.seed, number, given.readback) for number in numbers], given.jobs):
        found.append(one)
        if not is_same(one) or not one.hits:
            _tell(given.seed, one, given.readback, details=given.only is not None)
    print(table(found))
    if given.output is not None:
        given.output.write_text(json.dumps(figures(given.seed, given.readback, found), indent=1) + "\n")
    return int(share(found) < given.wanted)


def is_same(one: Outcome) -> bool:
    """Whether a run ended as it would have without its fault; the last row that loggers got of a step counts."""
    return not one.error and set(one.different) <= {"/rows"}


def share(found: Sequence[Outcome]) -> float:
    """Share of the runs that were struck that ended as without their fault, but for what was logged meanwhile."""
    struck = [one for one in found if one.hits]
    return sum(map(learner_is_same, struck)) / max(1, len(struck))


def learner_is_same(one: Outcome) -> bool:
    """Whether all but what had been logged before the fault was found is the same."""
    return not one.error and all(
        name.split("/")[1] in ("logged", "rows", "metrics", "progress") for name in one.different
    )


def table(found: Sequence[Outcome]) -> str:
    """A row for each kind of fault."""
    lines = ["| fault | runs | bit for bit the same | all but values logged meanwhile |", "|---|--:|--:|--:|"]
    for kind in (*KINDS, "all"):
        mine = [one for one in found if one.hits and kind in (one.one.kind, "all")]
        same, learner = sum(map(is_same, mine)), sum(map(learner_is_same, mine))
        lines.append(f"| {kind} | {len(mine)} | {same} | {learner} |")
    return "\n".join(lines)


def figures(seed: int, readback: str, found: Sequence[Outcome]) -> dict[str, object]:
    """What the documents name."""
    struck = [one for one in found if one.hits]
    return {
        "seed": seed,
        "readback": readback,
        "runs": len(found),
        "struck": len(struck),
        "same": sum(map(is_same, struck)),
        "same but for values logged meanwhile": sum(map(learner_is_same, struck)),
        "kinds": dict(Counter(one.one.kind for one in struck)),
        "others": [
            {
                "number": one.number,
                "different": list(one.different)[:8],
                "records": list(one.records),
                "error": one.error,
            }
            for one in struck
            if not is_same(one)
        ],
    }


def _tell(seed: int, one: Outcome, readback: str, *, details: bool) -> None:
    most = None if details else 4
    what = "never struck" if not one.hits else f"{len(one.different)} differ: {', '.join(one.different[:most])}"
    print(
        f"python -m benchmarks.transient --seed {seed} --readback {readback} --only {one.number}  "
        f"# {one.one.kind} {one.one.value}, {what}; "
        f"{'; '.join(one.records[:most]) or 'nothing done'} {one.error[:200]}",
        flush=True,
    )
    if details:
        print(one.one)


if __name__ == "__main__":
    sys.exit(main())

"""Puts runs to faults of every kind and checks what the guard promises: ``python -m benchmarks.chaos --seed K``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.processes import results

from .arc import arc_outcomes
from .report import coverage, figures, table
from .running import Outcome, outcome


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign; gives 1 where something promised does not hold."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="what is drawn")
    parser.add_argument("--runs", type=int, help="draws to make (default: as many as there is time for)")
    parser.add_argument("--minutes", type=float, default=2.0, help="after which no further draw begins (default: 2)")
    parser.add_argument("--only", type=int, help="number of the one draw to make")
    parser.add_argument("--first", type=int, default=0, help="number of the first draw")
    parser.add_argument("--jobs", type=int, default=1, help="processes; with several, give --runs")
    parser.add_argument("--output", type=Path, help="where figures go, as JSON")
    given = parser.parse_args(arguments)
    if given.jobs > 1 and given.runs is None:
        parser.error("--jobs needs --runs, since a process does not know how much time the others took")
    found: list[Outcome] = []
    for one in results(outcome, _Jobs(given), given.jobs):
        found.append(one)
        if one.wrong or given.only is not None:
            _tell(given.seed, one)
    arc = arc_outcomes(given.seed, found, os.environ.get("ARC_PYTHON"))
    print(table(found, arc))
    print(coverage(given.seed, found))
    if given.output is not None:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(figures(given.seed, found, arc), indent=1) + "\n")
    return int(any(one.wrong for one in found))


class _Jobs(Sequence[tuple[int, int]]):
    """The draws to make; where the time is limited, a draw is given out only as long as there is some left."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.seed = given.seed
        self.ends = time.monotonic() + 60 * given.minutes if given.runs is None and given.only is None else None
        count = 1 if given.only is not None else given.runs if given.runs is not None else 1 << 30
        first = given.first if given.only is None else given.only
        self.numbers = range(first, first + count)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[int, int]:  # type: ignore[override]
        return self.seed, self.numbers[index]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for number in self.numbers:
            if self.ends is not None and time.monotonic() >= self.ends:
                return
            yield self.seed, number


def _tell(seed: int, one: Outcome) -> None:
    print(f"python -m benchmarks.chaos --seed {seed} --only {one.number}  # {one.one.kind} {one.one.value}")
    for what in one.wrong:
        print(f"  ! {what}")
    print(f"  {'; '.join(one.records) or 'nothing done'} {one.error}")
    print(f"  {one.one}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""Finds, for every task and optimizer, a good rate and the largest that converges, and writes ``rates.py``.

Run offline, ``python -m benchmarks.rescue.calibrate``; the suite reads the table only.
"""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import replace
from pathlib import Path

import torch

from .cases import Case, steps_of
from .models import TASKS
from .running import Trained, train

OPTIMIZERS = ("sgd", "momentum", "adam", "adamw", "rmsprop", "adagrad", "lbfgs")
GRID = tuple(10 ** (e / 3) for e in range(-15, 7))


def improvement(task: str, optimizer: str, rate: float, share: float = 1.0) -> float:
    """Improvement of the held-out loss, the lesser of two seeds; −inf where a run did not end finite."""
    worst = math.inf
    for seed in (11, 12):
        steps, batch = steps_of(task, optimizer)
        case = Case("calibrate", task, optimizer, rate, int(share * steps), seed, batch=batch)
        run = train(case)
        worst = min(worst, run.initial - run.final if run.ended_well else -math.inf)
    return worst


def sweep(task: str, optimizer: str) -> tuple[float, float, float]:
    """A good rate, the largest that converges, and the improvement the good one brings.

    Good is what improves most within half of the run, so that a run saved midway has time to recover. The largest that
    converges is the end of the stretch of rates, upward from the good one, that reach 90 % of its improvement.
    """
    first = 6 if optimizer in ("lbfgs", "adagrad", "sgd") else 0
    last = len(GRID) if optimizer in ("sgd", "lbfgs", "adagrad") else 18
    halves = {}
    for i in range(first, last):
        halves[i] = improvement(task, optimizer, GRID[i], 0.5)
        best = max(halves.values())
        if best > 0 and all(halves.get(j, math.inf) < 0.3 * best for j in (i, i - 1, i - 2)):
            break
    for best in sorted(halves, key=lambda i: -halves[i]):
        gained = improvement(task, optimizer, GRID[best])
        if gained >= 0.9 * halves[best]:
            break
    largest = best
    while largest + 1 < len(GRID) and improvement(task, optimizer, GRID[largest + 1]) >= 0.9 * gained:
        largest += 1
    return GRID[best], GRID[largest], gained


def check(pattern: str, seeds: int = 2) -> None:
    """Say of every failing form whether a saved run can reach its twin: by another seed, and in half of the steps.

    Prints the lowest share of the twin's improvement that twins with other seeds regain, that twins with two thirds of
    the steps do, and that two thirds at a third of the rate do. A form whose first figure lies below 0.9 is decided by
    chance; one whose last two do leaves no time to be saved.
    """
    from .cases import FAILING

    seen: dict[str, tuple[float, ...]] = {}
    for form in (f for f in FAILING if re.search(pattern, f.name) and f.savable):
        key = form.name.partition(":")[2]
        if key not in seen:
            others, shorter, slower = [], [], []
            for seed in range(seeds):
                twin = form.draw(seed).twin
                run, steps = train(twin), twin.steps * 2 // 3

                def share(case: Case, run: Trained = run) -> float:
                    return (run.initial - train(case).final) / (run.initial - run.final)

                others += [share(replace(twin, seed=twin.seed + 1000 + i)) for i in range(2)]
                shorter.append(share(replace(twin, steps=steps)))
                slower.append(share(replace(twin, steps=steps, rate=twin.rate / 3)))
            seen[key] = min(others), min(shorter), min(slower)
        doubt = "" if min(seen[key][:2]) >= 0.93 else "  <- doubtful"
        print(f"{form.name:48s}" + " ".join(f"{x:6.3f}" for x in seen[key]) + doubt, flush=True)


def main() -> None:
    """Sweep what the arguments ask for and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", default=".", help="regular expression")
    parser.add_argument("--check", metavar="REGEX", help="instead, say which failing forms can be saved at all")
    parser.add_argument("--optimizers", default=".", help="regular expression")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.check is not None:
        check(arguments.check)
        return
    path = Path(__file__).with_name("rates.py")
    try:
        from .rates import RATES
    except ImportError:
        RATES = {}  # noqa: N806 — the first table of all
    table = {task: dict(RATES.get(task, {})) for task in TASKS}
    for task in TASKS:
        for optimizer in OPTIMIZERS:
            wanted = re.search(arguments.tasks, task) and re.search(arguments.optimizers, optimizer)
            if not wanted or (optimizer == "lbfgs" and TASKS[task].adversarial):
                continue
            good, largest, gained = sweep(task, optimizer)
            table[task][optimizer] = (float(f"{good:.3g}"), float(f"{largest:.3g}"), float(f"{gained:.3g}"))
            print(task, optimizer, *table[task][optimizer], flush=True)
            lines = [f'    "{task}": {{\n' + "".join(
                f'        "{name}": {row},\n' for name, row in rows.items()) + "    },\n"
                for task, rows in table.items()]  # fmt: skip
            path.write_text(
                '"""Good rate, largest rate that converges, and improvement of the held-out loss; '
                'written by ``calibrate.py``."""\n\n'
                "RATES: dict[str, dict[str, tuple[float, float, float]]] = {\n" + "".join(lines) + "}\n"
            )


if __name__ == "__main__":
    main()

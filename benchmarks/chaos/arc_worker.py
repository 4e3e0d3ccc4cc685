"""Trains draws under arc-training; runs in the environment that has it.

Reads a number and the held-out losses of the run without the fault a line, and answers with one line.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.rescue.arc_worker import Watched
from benchmarks.transient.running import quiet

from .arc import ArcOutcome
from .draws import draw
from .injector import Injector
from .training import cost, train


def main(seed: int) -> None:
    """Answer until nobody asks."""
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr
    checked = False
    for line in sys.stdin:
        number, initial, final = line.split()
        one, watched = draw(seed, int(number)), Watched()
        with quiet(), tempfile.TemporaryDirectory(prefix="chaos-") as folder:
            if not checked:
                twin = train(one, Injector(None), Path(folder) / "twin")
                if (repr(twin.initial), repr(twin.final)) != (initial, final):
                    raise SystemExit(f"draw {number} ends at {twin.final} here, not at {final}")
                checked = True
            left = train(one, Injector(one), Path(folder) / "arc", watched)
        found = 1.0 if left.error else cost(float(initial), left.final, float(final))
        answer = {"number": int(number), **asdict(ArcOutcome(found, left.error[:200], bool(watched.acts)))}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))

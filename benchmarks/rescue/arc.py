"""arc-training as a contender, from its own release in an environment of its own.

``make arc`` builds the environment; ``ARC_PYTHON`` names its interpreter. Every case is drawn and trained over there by
:mod:`.arc_worker`, with the same code and the same torch.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
from pathlib import Path
from typing import Any, final

from .cases import HEALTHY, Case
from .contenders import Attempt, Contender
from .running import Trained, train

ROOT = Path(__file__).parents[2]
PROBE = f"{HEALTHY[0].name}#0"


def arc_python() -> str | None:
    """The interpreter of the environment in which arc-training is installed, ``None`` where there is none."""
    return os.environ.get("ARC_PYTHON") or None


@final
class Arc(Contender):
    """``arc.api.integrations.LightningCallback()``, no argument given."""

    name, title = "arc", "arc-training"

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def attempt(self, case: Case) -> Attempt:
        """Train the case over there.

        Raises:
            RuntimeError: When the environment is missing or trains a bare run to other bits than this one.
        """
        if self._process is None:
            self._start()
        run, acts = self._ask(case.name, repr(case))
        return Attempt(run, acts, None)

    def _start(self) -> None:
        python = arc_python()
        if python is None:
            raise RuntimeError("arc-training has no environment: run `make arc`, and set ARC_PYTHON to its python.")
        command = [python, "-W", "ignore", "-m", "benchmarks.rescue.arc_worker"]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        atexit.register(self._process.terminate)
        probe = HEALTHY[0].draw(0)
        there, _ = self._ask(probe.name, repr(probe), bare=True)
        if there.digest != train(probe).digest:
            raise RuntimeError(
                f"{python} trains {probe.name} to other bits than this environment: nothing can be said about bits "
                "there. Install the same torch and numpy in both (`make arc` does)."
            )

    def _ask(self, name: str, described: str, *, bare: bool = False) -> tuple[Trained, list[dict[str, Any]]]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"case": name, "described": described, "bare": bare}) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"The worker with arc-training ended at {name} with status {process.wait()}.")
        answer = json.loads(line)
        run = answer["run"]
        run["poisoned"] = tuple(run["poisoned"])
        run["error"] = tuple(run["error"]) if run["error"] else None
        return Trained(**run), answer["acts"]

"""Trains cases under arc-training; runs in the environment that has it, and imports nothing else of ours.

Reads one request a line and answers with one line: the run, and what arc did.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

import pytorch_lightning as pl
import torch
from arc.api.integrations import LightningCallback

from .cases import FAILING, HEALTHY
from .healthy import BY_NAME
from .running import train

FORMS: dict[str, Any] = {form.name: form for form in (*FAILING, *HEALTHY)} | BY_NAME


class Watched(LightningCallback):  # type: ignore[misc]
    """arc's own callback, which also notes what its controller does."""

    def __init__(self) -> None:
        super().__init__(verbose=False)
        self.acts: list[dict[str, Any]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        judged = self.controller.step

        def step(loss: Any) -> Any:
            action = judged(loss)
            words = [w for w in ("rolled_back", "lr_reduced", "gradients_clipped") if getattr(action, w)]
            words += ["skip"] if action.should_skip else []
            if words:
                self.acts.append({"global_step": trainer.global_step, "fault": action.failure_type, "remedies": words})
            return action

        self.controller.step = step


def main() -> None:
    """Answer until nobody asks."""
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        asked = json.loads(line)
        form, _, seed = asked["case"].rpartition("#")
        case = FORMS[form].draw(int(seed))
        if repr(case) != asked["described"]:
            raise SystemExit(f"{asked['case']} is another case here: {case!r}")
        watched = Watched()
        run = train(case, [] if asked["bare"] else [watched])
        print(json.dumps({"run": asdict(run), "acts": watched.acts}), file=answers, flush=True)


if __name__ == "__main__":
    main()

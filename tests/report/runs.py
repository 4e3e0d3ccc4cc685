"""Runs in a folder, written by hand: what the page and the figure are drawn from."""

from __future__ import annotations

import json
import math
from pathlib import Path

from lightning_nanguard import Advice, Finding, Intervention, Reading
from lightning_nanguard.record.curve import CURVE_FILE, CurveFile
from lightning_nanguard.record.files import ADVICE_FILE, RECORDS_FILE
from lightning_nanguard.record.jsonl import JsonLines
from lightning_nanguard.record.layer_norms import LAYER_NORMS_FILE
from lightning_nanguard.record.run_log import append_event

HOSTILE = "<script>document.title='owned'</script>\x1b[2J\u202e$\\frac{\"'&--></svg><img src=http://127.0.0.1:9/x>"
"""A name that would run, load, break the page or turn text around where it is not escaped."""


def write_run(folder: Path, name: str = "net.0", steps: int = 200, ended: bool = True) -> Path:
    """A run with a rollback at step 60, a skipped batch at step 100, advice, and norms of a layer of that name."""
    folder.mkdir(parents=True, exist_ok=True)
    append_event(folder, "fit", {"run": "20261128-220000-abcdef", "step": 0})
    curve = CurveFile(folder / CURVE_FILE)
    for step in range(1, steps + 1):
        loss = math.nan if step in (60, 100) else 3.0 / step + 0.5
        clip = 2.0 if step > 60 else None
        curve.add(Reading(step, 0, loss, 2 * loss), 0.1 if step <= 60 else 0.05, clip)
    curve.write(last=True)
    finding = Finding(
        "non_finite_input", 0.9, {"column": 3.0, "name": name}, name, (5, 7), f"{name} holds NaN. Clean the data."
    )
    sink = JsonLines(folder / RECORDS_FILE)
    run = "20261128-220000-abcdef"
    message = "the loss is nan"
    for one in (
        Intervention(
            60,
            0,
            59,
            "non_finite_loss",
            "loss",
            ("restore", "scale"),
            0.1,
            0.05,
            40,
            message=message,
            updates_lost=20,
            run=run,
        ),
        Intervention(100, 0, 99, name, name, ("skip", name), 0.05, 0.05, cause=name, finding=finding, run=run),
    ):
        sink.write(one)
    layers = {"run": run, "global_step": 60, "fault": "non_finite_loss", "updates": [59, 60]}
    lines = {**layers, "layers": {name: [0.5, "NaN"], "net.2": [0.25, None]}}
    (folder / LAYER_NORMS_FILE).write_text(json.dumps(lines) + "\n", encoding="utf-8")
    JsonLines(folder / ADVICE_FILE).write(Advice(0, 0, "preflight", finding))
    if ended:
        append_event(folder, "end", {"updates": steps, "faults": {}, "lr_multiplier": 0.5})
    return folder

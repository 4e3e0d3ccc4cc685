"""The plugin in examples/plugin, which docs/plugins.md describes step by step, works from YAML."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from lightning_nanguard.record.files import read_records

ROOT = Path(__file__).parents[2]


def test_a_plugin_is_used_from_yaml(tmp_path: Path) -> None:
    """Its detector finds the batch that only it can see, its rule names the cause, its remedy notes every fault beside
    the skip, and its sink counts causes."""
    paths = [str(ROOT), str(ROOT / "examples" / "plugin"), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, str(ROOT / "examples" / "train.py"), "fit"]
    done = subprocess.run(
        [*command, "--config", str(ROOT / "examples" / "plugin" / "config.yaml"), "--trainer.max_epochs", "1"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [path] = tmp_path.rglob("interventions.jsonl")
    records = read_records(path)
    assert [(one.fault, one.remedies) for one in records] == [
        ("loss_above", ("skip", "note")),
        ("non_finite_loss", ("skip", "note")),
        ("non_finite_loss", ("skip", "note")),
    ]
    assert records[0].cause == "loss_above_limit"
    notes = (tmp_path / "example_logs" / "notes.txt").read_text(encoding="utf-8").splitlines()
    assert notes[0].endswith("above the limit of 20")
    assert len(notes) == 3
    tally = json.loads(path.with_name("tally.json").read_text(encoding="utf-8"))
    assert tally == {"loss_above_limit": 1, "non_finite_input": 2}


def test_the_plugin_is_a_package() -> None:
    """It declares what it needs, so that it can be installed."""
    text = (ROOT / "examples" / "plugin" / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dependencies = ["lightning-nanguard"]' in text
    assert 'packages = ["nanguard_extras"]' in text

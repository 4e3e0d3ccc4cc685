"""The examples do what the README promises, with either name of Lightning."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
CHANCE = 0.2
"""Ten classes: an accuracy below this is no more than guessing."""


def run_example(name: str, *args: str, package: str, cwd: Path) -> str:
    """Output of an example run in an empty directory; the error's end is shown when it fails."""
    return _run([str(EXAMPLES / name), *args], package, cwd)


def _run(arguments: list[str], package: str, cwd: Path) -> str:
    if package == "lightning.pytorch":
        pytest.importorskip("lightning")
    path = os.pathsep.join(filter(None, [str(EXAMPLES.parent), str(EXAMPLES), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, "LIGHTNING_PACKAGE": package, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, f"{arguments[-1]} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def records_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    """Bare runs end at chance, guarded ones near the healthy run, each cured by the remedy that fits its fault."""
    pytest.importorskip("rich")
    out = run_example("demo.py", "--fast", "--json", "results.json", package="pytorch_lightning", cwd=tmp_path)
    results = {(r["run"], r["guarded"]): r for r in json.loads((tmp_path / "results.json").read_text())}

    healthy = results.pop(("healthy", False))
    assert healthy["accuracy"] > 0.9
    assert len(results) == 4
    for (run, guarded), result in results.items():
        if not guarded:
            assert result["accuracy"] < CHANCE, run
            assert result["loss"] is None, run
            continue
        assert result["stopped"] is None, run
        assert result["accuracy"] > healthy["accuracy"] - 0.05, run
        assert result["interventions"] > 0, run
        records = records_of(tmp_path / result["records"])
        assert len(records) == result["interventions"], run
        for record in records:
            assert ("scale" in record["remedies"]) == (record["lr_after"] < record["lr_before"]), run
        # Lines of the display are cut to its width, the path's own line is not.
        assert result["records"] in out, run

    too_fast, corrupt = (results[run, True] for run in ("rate 20 x too high", "3 corrupt images"))
    assert {"restore", "clip"} <= too_fast["remedies"].keys()
    assert corrupt["lr_lowest"] == corrupt["lr_before"], "a corrupt image is no reason to lower the rate"


def test_picture(tmp_path: Path) -> None:
    """The picture of the README is drawn of a run that the guard saved."""
    out = run_example("picture.py", "--fast", "--output", "run.png", package="pytorch_lightning", cwd=tmp_path)
    assert re.search(r"run\.png written: [1-9] intervention", out)
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_train_from_yaml(package: str, tmp_path: Path) -> None:
    """The guard, its detectors and its remedies come from a YAML file by class path, under LightningCLI."""
    guarded = run_example("train.py", *_yaml(8), package=package, cwd=tmp_path)
    assert held_out_accuracy(guarded) > 0.9
    (journal,) = tmp_path.glob("example_logs/**/nanguard/interventions.jsonl")
    assert records_of(journal)


@pytest.mark.slow
def test_train_from_yaml_without_the_guard(tmp_path: Path) -> None:
    """The same run is lost in its first epoch without the guard."""
    bare = run_example("train.py", *_yaml(1), "--trainer.callbacks=null", package="pytorch_lightning", cwd=tmp_path)
    assert held_out_accuracy(bare) < CHANCE


def _yaml(epochs: int) -> tuple[str, ...]:
    pytest.importorskip("jsonargparse")
    quick = (f"--trainer.max_epochs={epochs}", "--trainer.enable_progress_bar=false")
    return "fit", "--config", str(EXAMPLES / "config.yaml"), *quick


# Package, and what examples print with it, in this order.
THREADS = {
    "pytorch_lightning": {
        "linear_rate.py": [
            r"learning rate 0\.0001: .*\n  ends at \d\.",
            r"learning rate 0\.001: .*inf.*\n  ends at nan",
            r"with NaNGuard\(\): .*\n  ends at \d\.",
            r"cause: (ill_conditioned|learning_rate_too_high) in ",
            r"learning rate of 0\.001 .*allows a rate of at most 0\.000\d+",
        ],
        "nan_classifier.py": [
            r"loss by hand: not finite from batch \d+ on; held-out accuracy 10\.0%",
            r"with NaNGuard\(\): .*accuracy 9\d\.",
            r"cause: log_of_zero in training_step \((backward of )?log, nan_classifier\.py:\d+\)",
            r"torch's own: finite to the end; held-out accuracy 9\d\.",
        ],
    },
    "lightning.pytorch": {
        "sigmoid_digits.py": [
            r"sigmoids and a squared loss: .*accuracy [01]?\d\.",
            r"cause: mse_for_classification in training_step \(squared error, sigmoid_digits\.py:\d+\)",
            r"cause: vanishing_gradient in net\.0\n.* is 0\.\d+ in net\.14 and \d\.?\d*e-0\d in net\.0",
            r"ReLU and cross-entropy: .*accuracy 9\d\..*\n  the preflight found nothing",
        ],
        "flat_loss.py": [
            r"begin at zero: .*\n  cause: saddle_point in loss\n.*smallest Hessian eigenvalue is -",
            r"model of a parabola: .*\n  cause: local_minimum in loss",
            r"too large: .*\n  cause: oscillation in loss\n.*cosine -1\.00",
            r"model of linear data: .*\n  the guard found nothing",
        ],
    },
}

# Importing takes longer than running: one process for all of a package, told apart by a line before each.
TOGETHER = """
import runpy, sys
for path in sys.argv[1:]:
    print("EXAMPLE", path, flush=True)
    runpy.run_path(path, run_name="__main__")
"""


@pytest.mark.parametrize("package", THREADS)
def test_the_cause_is_named(package: str, tmp_path: Path) -> None:
    """Each failure that practitioners ask about has its cause named, and where it can be saved it is."""
    pytest.importorskip("scipy")
    expected = THREADS[package]
    out = _run(["-c", TOGETHER, *(str(EXAMPLES / name) for name in expected)], package, tmp_path)
    for printed, (name, patterns) in zip(out.split("EXAMPLE ")[1:], expected.items(), strict=True):
        assert printed.split("\n", 1)[0].endswith(name)
        rest = printed
        for pattern in patterns:
            found = re.search(pattern, rest)
            assert found, f"{pattern} is not in\n{rest}\nof\n{printed}"
            rest = rest[found.end() :]
    assert not list(tmp_path.iterdir())


def held_out_accuracy(output: str) -> float:
    found = re.search(r"held-out accuracy ([\d.]+)", output)
    assert found, output[-2000:]
    return float(found[1])

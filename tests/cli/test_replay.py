"""`nanguard replay` runs the batch of an incident again, here or elsewhere."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from lightning_nanguard.cli.main import main
from lightning_nanguard.cli.output import say_table
from lightning_nanguard.cli.replay import layer_table
from lightning_nanguard.diagnosis.bundle import read
from lightning_nanguard.diagnosis.case import Layer
from lightning_nanguard.diagnosis.module_state import put_into
from tests.classifier import incident

ROOT = Path(__file__).parents[2]

INCIDENTS: dict[str, tuple[dict[str, Any], tuple[float, int] | None, str]] = {
    "log": ({"log": True}, (-60.0, 14), "log_of_zero"),
    "nan": ({"middle": "dropout"}, (math.nan, 9), "non_finite_input"),
    "rate": ({"lr": 3000.0}, None, "learning_rate_too_high"),
}


@pytest.mark.parametrize("kind", list(INCIDENTS))
def test_an_incident_is_reproduced(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The batch of an incident is run again, and the cause is the one that the run found."""
    options, fault, cause = INCIDENTS[kind]
    guard, path = incident(tmp_path, fault, **options)
    assert guard.interventions[0].cause == cause
    assert main(["replay", str(path), "--module", "tests.classifier:Model"]) == 0
    said = capsys.readouterr().out
    assert f"cause in the run: {cause}" in said
    assert f"\ncause: {cause}" in said
    # Layer by layer, in the order in which they ran.
    heading, *layers = said.split("\nlayer ")[1].splitlines()
    assert heading.split() == ["kind", "in", "out", "from", "to", "weight", "gradient", "saturated", "dead"]
    assert [line.split()[0] for line in layers][:1] == ["net.0"]


def test_an_incident_is_reproduced_elsewhere(tmp_path: Path) -> None:
    """A fresh process that knows nothing but the folder finds the same."""
    _, path = incident(tmp_path, INCIDENTS["log"][1], **INCIDENTS["log"][0])
    done = subprocess.run(
        [sys.executable, "-m", "lightning_nanguard.cli", "replay", str(path), "--module", "tests.classifier:Model"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "\nreplayed: loss nan" in done.stdout
    assert "\ncause: log_of_zero in training_step (log, classifier.py:" in done.stdout


def test_a_replay_needs_the_same_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Arguments can be given; a module that the state does not fit is named with the first difference."""
    _, path = incident(tmp_path, (-60.0, 14), log=True)
    assert main(["replay", str(path), "--module", "tests.classifier:make_model", "--args", "{}"]) == 0
    assert "log_of_zero" in capsys.readouterr().out
    # Without the logarithm nothing happens.
    assert main(["replay", str(path), "--module", "tests.classifier:Model", "--args", '{"log": false}']) == 1
    with pytest.raises(ValueError, match=r"net.0.bias is \(16,\) in the incident and missing in the module \(4 such\)"):
        put_into(nn.Linear(2, 2), read(path).state)


def test_an_incident_never_chooses_the_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The module that an incident names is only printed, what it holds is given to a module's class alone, and what is
    no module is refused."""
    _, path = incident(tmp_path, (-60.0, 14), log=True)
    text, ran = (path / "bundle.json").read_text(), tmp_path / "ran"
    rest = json.loads(text) | {"module": "os:system", "hparams": {"command": f"touch {ran}"}}
    (path / "bundle.json").write_text(json.dumps(rest))
    for module, said in (
        ((), "If you trust the module of the run, add --module os:system"),
        (("--module", "os:system"), "TypeError"),
        (("--module", "tests.classifier:OPTIONS"), "tests.classifier has no class OPTIONS; it has"),
        (("--module", "builtins:dict"), "builtins:dict made a dict, which is not a LightningModule"),
    ):
        assert main(["replay", str(path), *module]) == 2
        assert said in capsys.readouterr().err
    assert not ran.exists()


@pytest.mark.parametrize(
    ("rest", "said"),
    [
        ("{}", "KeyError: 'schema'"),
        ("[]", "TypeError"),
        ("[" * 100_000, "RecursionError"),
        ('{"schema": 9}', "was written by a later version"),
        ("", "JSONDecodeError"),
    ],
)
def test_a_damaged_incident_is_one_line(
    rest: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the file holds, the error is one line."""
    _, path = incident(tmp_path, (-60.0, 14), log=True)
    (path / "bundle.json").write_text(rest)
    assert main(["replay", str(path)]) == 2
    line = capsys.readouterr().err
    assert said in line
    assert line.count("\n") == 1


def test_layer_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Columns are aligned, what is not known is a dash, and without layers there is no table."""
    assert layer_table([]) == []
    say_table(layer_table([Layer("net.0", "Linear", outputs=1.25), Layer("net.10", "ReLU", outputs=0.5)]))
    heading, line, other = capsys.readouterr().out.splitlines()
    assert heading.index(" out ") == line.index(" 1.25 ") == other.index(" 0.5 ")
    assert heading.startswith("layer   kind    in  out")
    assert line.split() == ["net.0", "Linear", "–", "1.25", "–", "–", "–", "–", "–", "–"]

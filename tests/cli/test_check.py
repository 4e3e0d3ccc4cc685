"""`nanguard check` says what is wrong before a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_nanguard.cli.main import main
from tests import classifier
from tests.classifier import config

CHECKS: list[tuple[str, str, str, tuple[str, ...], int, str]] = [
    ("healthy", "", "", (), 0, "found nothing wrong"),
    ("healthy, all", "", "", ("--gradients", "--overfit"), 0, "learned by heart"),
    ("pixels", "", "scale: 150", (), 1, "unnormalised_input in field 0 of the batch: first loss "),
    ("bad sample", "", "bad: 37", (), 1, "sample 37 of the data set holds NaN or Inf in field 0, column 2"),
    ("softmax", "middle: softmax", "", (), 1, "double_softmax in training_step (softmax, classifier.py:"),
    ("gradient", "middle: wrong", "", ("--gradients",), 1,
     "wrong_gradient in net.1 (backward of Wrong, classifier.py:"),
    ("rate", "lr: 1.e-9", "", ("--overfit",), 0, "the model can learn them, with another optimizer or rate"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "data", "options", "status", "said"), [c[1:] for c in CHECKS], ids=[c[0] for c in CHECKS]
)
def test_check(
    model: str,
    data: str,
    options: tuple[str, ...],
    status: int,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`nanguard check` says what is wrong before a run, by its exit status too, and writes nothing."""
    monkeypatch.chdir(tmp_path)
    path = config(tmp_path, model=model, data=data)
    assert main(["check", "--config", str(path), *options]) == status
    assert said in capsys.readouterr().out
    assert [found.name for found in tmp_path.iterdir()] == ["config.yaml"]


def test_check_takes_the_classes_of_a_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A configuration that names no classes is completed on the command line, by module or by file."""
    path = tmp_path / "config.yaml"
    path.write_text("fit:\n  model: {middle: softmax}\n  data: {count: 32}\n  ckpt_path: null\n")
    named = ["--model", "tests.classifier:Model", "--data", f"{classifier.__file__}:Numbers"]
    assert main(["check", "--config", str(path), *named]) == 1
    assert "double_softmax" in capsys.readouterr().out
    assert main(["check", "--config", str(path)]) == 2
    assert "names no class for the model" in capsys.readouterr().err


def test_check_takes_a_budget_by_class_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A callback's argument may be given as a class with its arguments, as in the configuration of a run."""
    path = config(tmp_path)
    budget = "{class_path: lightning_nanguard.Budget, init_args: {max_rollbacks: 5}}"
    guard = f"[{{class_path: lightning_nanguard.NaNGuard, init_args: {{budget: {budget}}}}}]"
    path.write_text(f"{path.read_text()}\ntrainer: {{callbacks: {guard}}}\n")
    assert main(["check", "--config", str(path)]) == 0, capsys.readouterr().err


DATA_FILE = """
import torch
from torch.utils.data import DataLoader, TensorDataset
from tests.classifier import Numbers

def loader(bad=3):
    x = torch.ones(40, 2)
    x[bad, 1] = float("nan")
    x[7] = 1e9
    return DataLoader(TensorDataset(x, torch.zeros(40)), batch_size=8, shuffle=True)

made = loader()
number = 3
"""


def test_check_reads_the_data_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a configuration all samples of a loader or data module are read once, and the bad ones told by row."""
    path = tmp_path / "somedata.py"
    path.write_text(DATA_FILE)
    expected = [
        "data, row 3: not finite in field 0, column 1",
        "data, row 7: reaches 1e+09 in magnitude where half of the samples stay within 1 in field 0",
        "data: 40 samples read, 2 findings",
    ]
    for name in ("made", "loader"):
        assert main(["check", "--data", f"{path}:{name}"]) == 1
        shown = capsys.readouterr()
        assert shown.out.splitlines() == expected
        assert shown.err == ""
    assert main(["check", "--data", f"{path}:loader", "--args", '{"bad": 5}', "--factor", "1e12"]) == 1
    assert capsys.readouterr().out.startswith("data, row 5: not finite in field 0, column 1\ndata: 40 samples read, 1")
    assert main(["check", "--data", "tests.classifier:Numbers"]) == 0
    assert capsys.readouterr().out == "train: 64 samples read, 0 findings\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give --config to check a run, or --data alone"),
        (["--data", "{}:number"], "3 is not a data module, loader or data set"),
        (["--data", "{}:made", "--factor", "0.5"], "--factor 0.5: expected a number above 1"),
    ],
)
def test_check_says_what_it_lacks(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be read is named."""
    path = tmp_path / "otherdata.py"
    path.write_text(DATA_FILE)
    assert main(["check", *(one.format(path) for one in arguments)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "body", "said"),
    [
        ("lacking", "configure_optimizers = None", "MisconfigurationException: "),
        (
            "failing",
            "def on_fit_start(self):\n        raise RuntimeError('no tokenizer')",
            "RuntimeError: no tokenizer (",
        ),
    ],
    ids=["lacking", "failing"],
)
def test_errors_of_the_users_module_are_one_line(
    name: str, body: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It names the line of the user's code, if the error came through one, and has no traceback."""
    code = tmp_path / f"{name}.py"
    code.write_text(f"from tests.classifier import Model\n\n\nclass Broken(Model):\n    {body}\n")
    path = tmp_path / "config.yaml"
    path.write_text("fit:\n  data: {count: 32}\n")
    named = ["--model", f"{code}:Broken", "--data", f"{classifier.__file__}:Numbers"]
    assert main(["check", "--config", str(path), *named]) == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("nanguard: ")]
    assert said in line
    assert (f"{code}, line 6, in on_fit_start" in line) is ("tokenizer" in said)

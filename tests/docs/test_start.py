"""What a new user runs first does what the pages say: quickstart, its commands, notebook, larger examples."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_nanguard.cli.main import main

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "start.md").read_text(encoding="utf-8")
PROGRAM = (ROOT / "examples" / "quickstart.py").read_text(encoding="utf-8")
BLOCKS = [text for language, text in re.findall(r"^```(\w*)\n([\s\S]*?)^```$", PAGE, re.MULTILINE) if not language]


def run(program: str, folder: Path, package: str = "pytorch_lightning") -> list[str]:
    """The lines that a program prints, on both streams, in an empty folder."""
    paths = [str(ROOT), str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "OMP_NUM_THREADS": "1",
            "LIGHTNING_PACKAGE": package,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder in which the quickstart was run, and what it printed."""
    folder = tmp_path_factory.mktemp("quickstart")
    return folder, run(PROGRAM, folder)


def test_the_quickstart_prints_what_the_page_shows(trained: tuple[Path, list[str]]) -> None:
    """Each line of the page is among the lines of the run, in the same order."""
    folder, printed = trained
    lines = iter([line.replace(f"{folder}{os.sep}", "") for line in printed])
    for shown in BLOCKS[1].splitlines():
        assert shown in lines, f"{shown}\nis not in\n" + "\n".join(printed)


def test_without_the_guard_the_weights_are_lost(tmp_path: Path) -> None:
    """The same program without the callback ends as the page says."""
    bare = PROGRAM.replace("callbacks=[guard]", "callbacks=[]")
    assert bare != PROGRAM
    assert BLOCKS[2].strip() in run(bare, tmp_path)


def test_the_commands_of_the_page(
    trained: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each command answers, and the report is written."""
    pytest.importorskip("matplotlib")
    folder, _ = trained
    monkeypatch.chdir(folder)
    commands = [line.split("#")[0] for line in BLOCKS[3].splitlines()]
    assert [shlex.split(one)[:2] for one in commands] == [["nanguard", one] for one in ("explain", "samples", "report")]
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0
    assert "row 123" in capsys.readouterr().out
    assert list(folder.rglob("report.html"))


def test_a_setting_is_changed_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both runs are compared as the page shows, and the checkpoint that it names is gone on from."""
    changed = PROGRAM.replace("NaNGuard()", "NaNGuard(quarantine=True)")
    run(PROGRAM, tmp_path)
    run(changed, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(BLOCKS[4])[1:]) == 0
    lines = iter(capsys.readouterr().out.splitlines())
    for shown in BLOCKS[5].splitlines():
        assert shown in lines
    path = re.search(r'ckpt_path="[^"]+"', BLOCKS[6])
    assert path
    longer = changed.replace("max_epochs=3", "max_epochs=4").replace("shuffle=True))", f"shuffle=True), {path[0]})")
    printed = "\n".join(run(longer, tmp_path))
    assert "NaNGuard: 1 bad sample that the run found before will be left out" in printed
    assert 'NaNGuard: 128 updates watched (act_on="certain"), no interventions' in printed


def test_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells run in order, and the last expressions have something to show."""
    pytest.importorskip("matplotlib")
    cells = json.loads((ROOT / "examples" / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    tree = ast.parse(code)
    shown = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Expr) and "fit" not in ast.unparse(node)]
    assert shown[1:] == ["guard.summary()", "guard.interventions", "guard.plot()"]
    look = "\nassert '<table' in guard.interventions._repr_html_()\nassert guard.plot().axes\nprint(guard.summary())"
    assert "3 batches skipped" in run(code + look, tmp_path)[-1]


@pytest.mark.slow
def test_a_gpt_of_characters(tmp_path: Path) -> None:
    """At a hundred times its rate it learns little without the guard, and with it about as much as at the good rate."""
    printed = "\n".join(
        run((ROOT / "examples" / "char_gpt.py").read_text(encoding="utf-8"), tmp_path, "lightning.pytorch")
    )
    good, lost, saved = (float(loss) for loss in re.findall(r"held-out loss ([\d.]+)", printed))
    assert lost > good + 0.4
    assert saved < good + 0.2
    assert "cause: learning_rate_too_high" in printed


def test_a_gan(tmp_path: Path) -> None:
    """Two bad rows ruin it without the guard, and with it its points lie near the circle."""
    printed = "\n".join(run((ROOT / "examples" / "gan.py").read_text(encoding="utf-8"), tmp_path))
    assert "no guard: mean distance from the circle nan" in printed
    found = re.search(r"NaNGuard\(\): mean distance from the circle ([\d.]+)", printed)
    assert found
    assert float(found[1]) < 0.15
    assert "because of rows [500, 2500]" in printed


def test_half_precision(tmp_path: Path) -> None:
    """The overflow is named with its line and ends the run; with the operation in float32 the model learns."""
    program = f"import runpy; runpy.run_path({str(ROOT / 'examples' / 'fp16.py')!r}, run_name='__main__')"
    printed = "\n".join(run(program, tmp_path))
    bare, guarded, cured = re.findall(r"(\d+) batches, loss (\S+), held-out accuracy ([\d.]+)", printed)
    assert bare[0] == "168"
    assert bare[1] == "nan"
    assert int(guarded[0]) < 70
    assert float(cured[2]) > 50 > 3 * float(bare[2])
    assert re.search(r"cause: low_precision_overflow in training_step \(bmm, fp16\.py:\d+\)", printed)

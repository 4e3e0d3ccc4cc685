"""`nanguard explain` tells the records of a run in words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lightning_nanguard import Advice, Finding, Intervention, NaNGuard
from lightning_nanguard.cli.main import main
from lightning_nanguard.record.files import ADVICE_FILE, RECORDS_FILE
from lightning_nanguard.record.jsonl import JsonLines
from lightning_nanguard.record.run_log import RUN_FILE, append_event
from lightning_nanguard.record.text import STEPS
from tests.classifier import Model, Numbers
from tests.helpers import batches, fit, folder_of, task, trainer_for, with_bad
from tests.report.runs import write_run


def test_explain_tells_records_and_advice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`nanguard explain` tells how the run went, every record with its cause, and what the preflight said."""
    guard = NaNGuard(preflight=True, dirpath=tmp_path / "run" / "nanguard")
    trainer = trainer_for(tmp_path, guard, max_epochs=1, limit_val_batches=0)
    trainer.fit(Model("softmax"), Numbers(bad=37))
    assert main(["explain", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"Run {guard.run_id} in {guard.run_dir}: ")
    assert said.splitlines()[0].endswith(" updates, 1 intervention")
    assert said.splitlines()[2].startswith("step 0 (epoch 0), advice (preflight): ")  # by step, so before interventions
    assert "step 0 (epoch 0), advice (preflight): non-finite input in field 0 of the data set: sample 37 of" in said
    assert "advice (preflight): double softmax in training_step (softmax, classifier.py:" in said
    assert "  why: non-finite input in field 0 of the batch: sample " in said
    assert "  done: skipped the batch" in said
    assert "  sample: row 37 of the data set" in said
    assert "\n  the loss went from " in said
    assert len(said.splitlines()) == 2 + 5 + 2 + 1
    assert said.splitlines()[-1] == STEPS


def test_a_run_whose_records_are_lost_is_not_healthy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The log of the run says how many interventions there were."""
    guard = NaNGuard()
    fit(task(), with_bad(3, 5, count=8), guard, folder=tmp_path)
    (folder_of(guard) / RECORDS_FILE).unlink()
    assert main(["explain", str(tmp_path)]) == 0
    assert "8 updates, 2 interventions, of which 2 cannot be read" in capsys.readouterr().out


def test_a_torn_line_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A run that was killed while it wrote leaves a torn line: one command warns of it once, the next one again."""
    folder = write_run(tmp_path)
    with open(folder / RECORDS_FILE, "a") as file:
        file.write('{"global_step": 7')
    for count in (1, 2):
        assert main(["explain", str(folder)]) == 0
        assert [" without a readable record" in text for text in caplog.messages] == [True] * count


def test_a_skipped_last_update_is_not_the_outcome(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run whose last batch was bad and was skipped is saved, and ends with the loss of the last update it made."""
    guards = NaNGuard(), NaNGuard(observe=True)
    for name, guard in zip(("saved", "watched"), guards, strict=True):
        fit(task(), with_bad(7, count=8), guard, folder=tmp_path / name)
    saved, watched = map(folder_of, guards)
    assert main(["explain", str(saved)]) == 0
    assert "nan;" not in capsys.readouterr().out.splitlines()[1]
    assert main(["explain", str(watched)]) == 0
    assert " to nan;" in capsys.readouterr().out.splitlines()[1]
    assert main(["compare", str(saved), str(watched)]) == 0
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:])
    assert re.split(r"  +", rows["outcome"]) == ["Saved", "Only observed"]
    assert re.fullmatch(r"\d\S* +nan", rows["loss at the end"])


def test_explain_tells_a_healthy_run_from_a_wrong_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run in which nothing happened is told as such; a folder without a run, or one that is not there, is an error
    that says where runs lie; a run that was killed is told from one that ended."""
    healthy = NaNGuard()
    fit(task(), batches(count=5), healthy, folder=tmp_path / "healthy")
    assert main(["explain", str(tmp_path / "healthy")]) == 0
    said = capsys.readouterr().out
    first, second = said.splitlines()
    assert first == f"Run {healthy.run_id} in {healthy.run_dir}: 5 updates, healthy, no interventions"
    assert re.fullmatch(r"  the loss went from \S+ to \S+; the learning rate is 0\.01", second)
    JsonLines(folder_of(healthy) / ADVICE_FILE).write(Advice(0, 0, "preflight", Finding("dead_relu", 0.9)))
    append_event(folder_of(healthy), "fit", {"run": healthy.run_id, "step": 5})
    append_event(folder_of(healthy), "end", {"updates": 9, "updates_of_fit": 4, "faults": {"non_finite_loss": 1}})
    assert main(["explain", str(tmp_path / "healthy")]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].endswith(
        ", resumed 1 time: 9 updates, no interventions in the whole run; 4 updates, 1 intervention since it was resumed"
    )
    assert told[2] == "step 0 (epoch 0), advice (preflight): dead relu"
    append_event(tmp_path / "healthy", "fit", {"run": "killed", "step": 0})
    assert main(["explain", str(tmp_path / "healthy")]) == 0
    assert f"Run killed in {tmp_path / 'healthy'}: it was killed" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    for folder, message in (("empty", "there is no run of NaNGuard in"), ("none", "there is no folder")):
        assert main(["explain", str(tmp_path / folder)]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert f"{message} {tmp_path / folder}" in shown.err


def test_a_log_that_is_damaged_or_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """That is said; a file that is none of a run is an error."""
    folder = write_run(tmp_path / "run")
    (folder / RUN_FILE).write_text("garbage")
    told = []
    for _ in range(2):
        assert main(["explain", str(folder)]) == 0
        told.append(capsys.readouterr().out.splitlines()[0])
        (folder / RUN_FILE).unlink(missing_ok=True)
    assert told == [
        f"Run with a damaged run.jsonl, so that it is not known how it ended, in {folder}",
        f"Run without its run.jsonl, so that it is not known how it ended, in {folder}",
    ]
    (tmp_path / "notes.txt").write_text("hello")
    assert main(["explain", str(tmp_path / "notes.txt")]) == 2
    assert f"there is no record in {tmp_path / 'notes.txt'}" in capsys.readouterr().err


def test_explain_reads_the_recorder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """How far the loss came, and around an intervention the loss and the layers that changed most."""
    assert main(["explain", str(write_run(tmp_path))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "  the loss went from 1.05 to 0.5153; the learning rate is 0.05"
    assert "  loss 0.5551 before, 0.5451 after (medians of up to 10 recorded losses)" in lines
    assert "  gradient norms in the last 2 updates: net.0 0.5 → nan" in lines


def test_explain_prints_every_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both of two records of a kind are told, the first in full, also without a log of the run; and nothing in one
    reaches the terminal as more than text."""
    sink = JsonLines(tmp_path / "version_0" / "nanguard" / "interventions.jsonl")
    for step in (7, 8):
        sink.write(Intervention(step, 0, step, "non_finite_loss", "loss", ("skip",), 0.1, 0.1))
    sink.write(Intervention(9, 0, 9, "evil\x1b[2J\nkind", "loss", ("restore", "scale\x9b1m"), 0.1, 0.05, 4))
    for where in (tmp_path, sink.path):
        assert main(["explain", str(where)]) == 0
        shown = capsys.readouterr().out
        assert "step 7 (epoch 0, batch 7): non-finite loss\n  done: skipped the batch\n" in shown
        assert "step 8 (epoch 0, batch 8): non-finite loss again; skipped the batch (2 so far)\n" in shown
        assert "went back to step 4" in shown
        assert all(line.isprintable() for line in shown.splitlines())
        assert ("Run without its run.jsonl" in shown) == (where == tmp_path)


def test_explain_thins_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of each kind the 1st, 2nd, 4th, 8th … are told, or all of them with --all; advice stands at its step."""
    folder = tmp_path / "nanguard"
    folder.mkdir()
    append_event(folder, "fit", {"run": "many", "step": 0})
    append_event(folder, "end", {"updates": 20, "faults": {}})
    records, advice = JsonLines(folder / RECORDS_FILE), JsonLines(folder / ADVICE_FILE)
    for step in range(1, 21):
        records.write(Intervention(step, 0, step, "non_finite_loss", "loss", ("skip",), 0.1, 0.1))
    advice.write(Advice(3, 0, "skipped batches", Finding("many_skipped_batches", 1.0)))
    for arguments, steps in (([], [1, 2, 3, 4, 8, 16]), (["--all"], [1, 2, 3, *range(3, 21)])):
        assert main(["explain", str(tmp_path), *arguments]) == 0
        said = capsys.readouterr().out
        assert [int(step) for step in re.findall(r"^step (\d+) ", said, re.M)] == steps
        assert "20 of 20 updates were skipped: almost nothing was learned; what to do: see step 1 below. If" in said
        assert ("-- 15 interventions not shown: nanguard explain --all --" in said) == (not arguments)


def test_the_order_of_a_resumed_run_is_that_of_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where steps were made twice, their numbers give no order."""
    folder = tmp_path / "nanguard"
    folder.mkdir()
    for step in (0, 5):
        append_event(folder, "fit", {"run": "again", "step": step})
    records, advice = JsonLines(folder / RECORDS_FILE), JsonLines(folder / ADVICE_FILE)
    for step in (7, 6):
        records.write(Intervention(step, 0, step, f"kind_{step}", "loss", ("skip",), 0.1, 0.1))
    advice.write(Advice(3, 0, "skipped batches", Finding("many_skipped_batches", 1.0)))
    assert main(["explain", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert re.findall(r"^(?:step (\d+) |-- the run)", said, re.M) == ["7", "", "6", "3"]

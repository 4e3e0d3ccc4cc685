"""The log of a run says which run it is, what it saved and how it ended."""

from __future__ import annotations

from pathlib import Path

from lightning_nanguard.record.run_log import RUN_FILE, RunLog, append_event, find_runs, new_run_id, read_run


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """Beginnings, saves and the end are read back; numbers that are not finite do not spoil a line."""
    append_event(tmp_path, "fit", {"run": "a", "step": 0})
    append_event(tmp_path, "save", {"run": "a", "path": "../x.ckpt", "step": 7})
    log = read_run(tmp_path)
    assert log is not None
    assert (log.folder, log.run_id, log.ended) == (tmp_path, "a", None)
    assert log.saved_by(tmp_path.parent / "x.ckpt") == log.saved["../x.ckpt"]
    assert log.saved["../x.ckpt"][1] == "a"
    assert log.saved_by(tmp_path / "x.ckpt") is None
    append_event(tmp_path, "end", {"updates": 9, "loss": float("nan")})
    ended = read_run(tmp_path)
    assert ended is not None
    assert ended.ended is not None
    assert (ended.ended["updates"], ended.ended["loss"]) == (9, "NaN")
    append_event(tmp_path, "fit", {"run": "a", "step": 5})
    resumed = read_run(tmp_path)
    assert resumed is not None
    assert [fit["step"] for fit in resumed.fits] == [0, 5]
    assert resumed.ended is None


def test_torn_and_strange_lines_are_left_out(tmp_path: Path) -> None:
    """A line cut short by a killed run costs that line alone; what is no log is none."""
    assert read_run(tmp_path) is None
    (tmp_path / RUN_FILE).write_bytes(b"\xff\xfe no log\n[1]\n" + b'{"event": "fit", "run": 3}\n')
    assert read_run(tmp_path) is None
    append_event(tmp_path, "fit", {"run": "a"})
    with open(tmp_path / RUN_FILE, "ab") as file:
        file.write(b'{"event": "save", "pa')
    append_event(tmp_path, "end", {"updates": 3})
    log = read_run(tmp_path)
    assert log is not None
    assert (log.run_id, log.saved) == ("a", {})
    assert log.ended is not None


def test_runs_are_found_in_order(tmp_path: Path) -> None:
    """All runs below a folder are found, the one begun or resumed last at the end; no two ids are alike."""
    for place, run, when in (("b/nanguard", "2", 20.5), ("a", "1", 10), ("a/deeper", "3", 30), ("a/resumed", "1", 40)):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        append_event(tmp_path / place, "fit", {"run": run, "time": when})
    found = find_runs(tmp_path)
    assert [run.run_id for run in found] == ["1", "2", "3", "1"]
    assert [run.begun for run in found] == [10.0, 20.5, 30.0, 40.0]
    assert RunLog(tmp_path, "x", ({"time": "yesterday"},)).begun == RunLog(tmp_path, "x").begun == 0.0
    assert len({new_run_id() for _ in range(100)}) == 100

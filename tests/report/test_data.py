"""What a run has left in its folder is read whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_nanguard import Intervention
from lightning_nanguard.record.files import RECORDS_FILE
from lightning_nanguard.record.jsonl import JsonLines
from lightning_nanguard.record.run_history import seen_from
from lightning_nanguard.record.run_log import append_event
from lightning_nanguard.report.data import RunData, find_run, read_run_data
from lightning_nanguard.report.page import page
from tests.report.runs import write_run


def test_all_of_a_run_is_read(tmp_path: Path) -> None:
    """Log, curves, interventions, advice and norms are there, with what they add up to."""
    data = read_run_data(write_run(tmp_path))
    assert data.log is not None
    assert (data.log.run_id, data.alive, data.stopped) == ("20261128-220000-abcdef", False, False)
    assert (len(data.curve), len(data.interventions), len(data.advice), len(data.layer_norms)) == (200, 2, 1, 1)
    assert (data.updates_lost, data.rate_now, data.remedies["restore"]) == (20, 0.05, 1)
    assert data.losses_at_ends() == pytest.approx((3.0 / 5.5 + 0.5, 3.0 / 195.5 + 0.5), rel=0.01)
    assert RunData(tmp_path, curve=[data.curve[59]]).losses_at_ends() == (None, None)
    before, after = data.losses_around(data.interventions[0])
    assert before is not None
    assert after is not None
    assert after < before
    stopped = Intervention(7, 0, 7, "non_finite_loss", "loss", ("stop",), 0.1, 0.1)
    assert RunData(tmp_path, interventions=(stopped,)).stopped
    assert RunData(tmp_path).losses_around(stopped) == (None, None)


def test_a_run_that_was_resumed_into_another_folder(tmp_path: Path) -> None:
    """What it left in the folder before comes first, and the page names that folder."""
    before = write_run(tmp_path / "version_0" / "nanguard")
    folder = tmp_path / "version_1" / "nanguard"
    folder.mkdir(parents=True)
    begin = {"run": "20261128-220000-abcdef", "step": 200, "checkpoint": before / "last.ckpt"}
    append_event(folder, "fit", seen_from(folder, begin))
    data = read_run_data(folder)
    assert [log.folder for log in data.earlier] == [before]
    assert (len(data.curve), len(data.interventions), len(data.advice), len(data.layer_norms)) == (200, 2, 1, 1)
    pytest.importorskip("matplotlib")
    assert f"resumed 1 time; before that in {before}" in page(data)


def test_the_newest_run_below_a_folder_is_found(tmp_path: Path) -> None:
    """The folder itself where it is one of a run, else the newest below it; a run of version 0.1.0, too."""
    assert find_run(tmp_path) is None
    old = tmp_path / "old"
    JsonLines(old / RECORDS_FILE).write(Intervention(7, 0, 7, "non_finite_loss", "loss", ("skip",), 0.1, 0.1))
    assert find_run(tmp_path) == find_run(old) == old
    new = write_run(tmp_path / "new")
    assert find_run(tmp_path) == find_run(new) == new

"""What the files in the folder of a run say."""

from __future__ import annotations

import math
from dataclasses import replace
from math import inf, nan
from pathlib import Path

import pytest

from lightning_nanguard import Advice, Finding, Intervention, Reading
from lightning_nanguard.record.curve import CURVE_FILE, CurveFile, CurvePoint, trained_again
from lightning_nanguard.record.files import RECORDS_FILE
from lightning_nanguard.record.jsonl import JsonLines
from lightning_nanguard.record.run_log import append_event, seen_from
from lightning_nanguard.record.trials import HeldTrial
from lightning_nanguard.report.data import RunData, find_run, read_run_data, recorded_around
from lightning_nanguard.report.figure import draw
from lightning_nanguard.report.page import page, verdict
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


def test_what_a_resumed_run_says_of_itself(tmp_path: Path) -> None:
    """Steps that were trained twice count once; the last fit has counts of its own once it has ended."""
    folder = write_run(tmp_path, ended=False)
    append_event(folder, "fit", {"run": "20261128-220000-abcdef", "step": 150})
    curve = CurveFile(folder / CURVE_FILE)
    for step in range(151, 241):
        curve.add(Reading(step, 0, 0.5, 1.0), 0.05, None)
    curve.write(last=True)
    data = read_run_data(folder)
    assert (data.updates, data.resumed_at, data.of_last_fit) == (240, [150], None)
    again = trained_again(data.curve)
    assert [one.step for one, old in zip(data.curve, again, strict=True) if old] == list(range(151, 201))
    append_event(folder, "end", {"updates": 240, "updates_of_fit": 90, "faults": {"spike": 2}})
    assert read_run_data(folder).of_last_fit == (90, 2)
    pytest.importorskip("matplotlib")
    told = page(read_run_data(folder))
    assert "All numbers on this page are of the whole run, which was resumed at step 150." in told
    assert "The last fit alone: 90 updates, 2 interventions." in told
    figure = draw(read_run_data(folder))
    assert {"trained again after a resume", "resumed"} <= set(figure.axes[1].get_legend_handles_labels()[1])
    (faint,) = (line for line in figure.axes[1].get_lines() if line.get_label() == "trained again after a resume")
    drawn = [x for x, y in zip(faint.get_xdata(), faint.get_ydata(), strict=True) if math.isfinite(y)]
    assert drawn == list(range(151, 201))


def test_a_run_of_which_most_was_skipped(tmp_path: Path) -> None:
    """It is not called saved: outcome and page say how many updates were skipped, and what to do."""
    skips = [Intervention(step, 0, step, "own", "loss", ("skip",), 0.1, 0.1) for step in range(2, 193)]
    curve = [CurvePoint(step, 1, 0, 1.0, 1.0, None, None, 0.1, None) for step in range(1, 193)]
    data = RunData(tmp_path, curve=curve, interventions=skips)
    assert verdict(data) == ("Mostly skipped: 191 of 192 updates were skipped: almost nothing was learned.", False)
    watched = [replace(one, applied=False) for one in skips]
    assert verdict(replace(data, interventions=watched))[0].startswith("Only observed")
    pytest.importorskip("matplotlib")
    assert "What to do: see step 2 below. If the data are bad" in page(data)


def test_losses_of_updates_that_were_not_kept(tmp_path: Path) -> None:
    """The loss of an update that was skipped or undone does not count, also if it is finite. A row that stands for
    several updates counts if one of them had a finite loss."""
    rows = [(2, 2, 1.0), (4, 2, 2.0), (6, 2, math.nan), (7, 1, 9.0), (8, 1, 4.0)]
    curve = [CurvePoint(step, updates, 0, loss, None, None, None, None, None) for step, updates, loss in rows]
    acts = [Intervention(step, 0, step, "own", "loss", ("skip",), 0.1, 0.1) for step in (4, 5, 6, 7)]
    data = RunData(tmp_path, curve=curve, interventions=acts)
    assert [one.step for one in data.kept] == [2, 4, 8]
    assert data.losses_around(acts[-1]) == (1.5, None)
    assert replace(data, interventions=[replace(one, applied=False) for one in acts]).kept == curve


def test_trials_are_on_the_page(tmp_path: Path) -> None:
    """A trial that confirmed nothing is told in the outcome and in a list of its own."""
    pytest.importorskip("matplotlib")
    trial = HeldTrial(40, 104, "stuck_loss", "not confirmed")
    advice = Advice(40, 0, "a finite suspicion", Finding("stuck_loss", 0.5))
    data = RunData(tmp_path, advice=[advice], trials=[trial])
    assert "1 trial held (steps 40 to 104), which confirmed nothing and changed nothing" in verdict(data)[0]
    assert f"<li>{trial.told()}</li>" in page(data)


def test_the_newest_run_below_a_folder_is_found(tmp_path: Path) -> None:
    """The folder itself where it is one of a run, else the newest below it; a run of version 0.1.0, too."""
    assert find_run(tmp_path) is None
    old = tmp_path / "old"
    JsonLines(old / RECORDS_FILE).write(Intervention(7, 0, 7, "non_finite_loss", "loss", ("skip",), 0.1, 0.1))
    assert find_run(tmp_path) == find_run(old) == old
    new = write_run(tmp_path / "new")
    assert find_run(tmp_path) == find_run(new) == new


def test_the_loss_and_the_layers(tmp_path: Path) -> None:
    """The loss before and after it, and the first and last norm of the layers that changed most; without curves and
    norms there is nothing to say."""
    data = read_run_data(write_run(tmp_path))
    first, second = data.interventions
    loss, norms = recorded_around(first, data)
    assert loss.startswith("loss 0.5")
    assert loss.endswith(" after (medians of up to 10 recorded losses)")
    assert norms == "gradient norms in the last 2 updates: net.0 0.5 → nan"
    assert len(recorded_around(second, data)) == 1  # no norms were kept there
    assert recorded_around(first, RunData(tmp_path)) == []
    layers = {"a": (nan, nan), "b": (inf, nan), "c": (1.0, inf)}
    lost = replace(data, layer_norms=[replace(data.layer_norms[0], layers=layers)])
    assert recorded_around(first, lost)[1].endswith(": c 1 → inf")  # the others were lost before


def test_many_layers_are_counted(tmp_path: Path) -> None:
    """Those that changed most are named, and the others counted."""
    data = read_run_data(write_run(tmp_path))
    layers = {f"layer.{number}": (1.0, 2.0) for number in range(9)}
    many = replace(data, layer_norms=[replace(data.layer_norms[0], layers=layers)])
    words = recorded_around(data.interventions[0], many)[1]
    assert words.endswith(": layer.0 1 → 2, layer.1 1 → 2, layer.2 1 → 2, and 6 more")

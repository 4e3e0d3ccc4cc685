"""The figure of a run shows its curves, and where the guard stepped in."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_nanguard import Intervention
from lightning_nanguard.record.curve import CurvePoint
from lightning_nanguard.report.data import RunData, read_run_data
from lightning_nanguard.report.figure import draw, matplotlib, spread, to_svg
from tests.report.runs import write_run

pytest.importorskip("matplotlib")


def test_curves_marks_and_arcs(tmp_path: Path) -> None:
    """There is an axis for each curve, a mark for each intervention, and an arc for the rollback."""
    figure = draw(read_run_data(write_run(tmp_path)))
    marks, losses, norms, rates = figure.axes
    assert [axes.get_ylabel() for axes in (losses, norms, rates)] == ["loss", "gradient norm", "learning rate"]
    assert [list(line.get_xdata()) for line in marks.get_lines()] == [[60], [100]]
    (arc,) = marks.patches
    start, _, end = arc.get_path().vertices[:3]
    assert start == pytest.approx((60.0, 0.0))
    assert end == pytest.approx((40.0, 0.0), abs=0.5)
    assert losses.get_legend_handles_labels()[1] == ["not finite"]
    assert "clipped at" in norms.get_legend_handles_labels()[1]
    text = to_svg(figure)
    assert text.startswith("<svg role=")
    assert "var(--first)" in text
    assert not re.findall(r'(?:href|src)="(?!#)', text)


def test_a_resumed_run_is_not_one_line(tmp_path: Path) -> None:
    """Steps that were trained again are a faint line of their own; large numbers do not spoil the scale."""
    point = CurvePoint(1, 1, 0, 1.0, 1.0, 1e301, 1e301, 0.1, None)
    data = RunData(tmp_path, curve=[point._replace(step=step) for step in (1, 2, 3, 2, 3, 4)])
    faint, line = draw(data).axes[1].get_lines()
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1, 2, 3, 4], [1.0] * 4)
    assert [x for x, y in zip(faint.get_xdata(), faint.get_ydata(), strict=True) if y == y] == [2, 3]
    assert faint.get_alpha() < 0.5
    assert len(draw(data).axes[2].get_lines()) == 0
    assert to_svg(draw(RunData(tmp_path)))


def test_axes_are_plain_and_in_sight(tmp_path: Path) -> None:
    """A logarithmic axis has plain numbers, and one loss far above all others does not flatten them."""
    points = [CurvePoint(step, 1, 0, 10.0 / step, 10.0 / step, 1.0, 1.0, 0.1, None) for step in range(1, 101)]
    points[49] = points[49]._replace(loss=1e20, loss_max=1e20)
    figure = draw(RunData(tmp_path, curve=points))
    losses, norms = figure.axes[1:3]
    assert losses.get_yscale() == "log"
    assert losses.get_ylim()[1] < 1e4
    assert norms.get_yscale() == "linear"
    text = to_svg(figure)
    assert "mathdefault" not in text
    assert ">0.1<" in text.replace("\n", "").replace(" ", "")


def test_marks_are_bounded_and_rollbacks_come_first() -> None:
    """Of many interventions some are drawn, spread over the run, every rollback among them while there are few."""
    skip = Intervention(0, 0, 0, "non_finite_loss", "loss", ("skip",), 0.1, 0.1)
    many = [replace(skip, global_step=step) for step in range(10_000)]
    back = replace(skip, global_step=5, snapshot_step=2, remedies=("restore",))
    drawn = list(spread([*many, back], 100))
    assert len(drawn) <= 100
    assert back in drawn
    assert max(one.global_step for one in drawn) > 9_800


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the extra that brings matplotlib."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-nanguard\[report\]'"):
        matplotlib()

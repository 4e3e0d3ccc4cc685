"""Runs laid side by side: what tells them apart, in rows, in one figure and on a page."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_nanguard import Advice, Finding, Intervention
from lightning_nanguard.record.curve import CurvePoint
from lightning_nanguard.record.run_log import RunLog
from lightning_nanguard.report.comparison import compare, comparison_page, draw_comparison, names_of
from lightning_nanguard.report.data import RunData, read_run_data
from tests.report.runs import HOSTILE, write_run

SKIP = Intervention(7, 0, 7, "non_finite_loss", "loss", ("skip",), 0.1, 0.1)


def run_of(steps: int, loss: float, lr: float, **begun: object) -> RunData:
    """A run with a constant loss, and what its log says it was begun with."""
    curve = [CurvePoint(step, 1, 0, loss, loss, 1.0, 1.0, lr, None) for step in range(1, steps + 1)]
    return RunData(Path(), RunLog(Path(), "run", ({"step": 0, **begun},), {"updates": steps}), curve=curve)


def test_the_rows() -> None:
    """Outcome, loss at the end and where the shorter run ended, rates, counts, and only the settings that differ."""
    one = run_of(20, 1.0, 0.1, settings={"act_on": "certain"}, hyperparameters={"lr": 0.1, "depth": 4})
    other = run_of(40, 0.5, 0.2, settings={"act_on": "certain", "quarantine": True}, hyperparameters={"lr": 0.2})
    advice = Advice(0, 0, "preflight", Finding("dead_relu", 0.9))
    runs = [replace(one, interventions=[SKIP, SKIP]), replace(other, advice=[advice])]
    assert compare(runs) == [
        ("outcome", ["Saved", "Nothing done"]),
        ("steps", ["20", "40"]),
        ("loss at the end", ["1", "0.5"]),
        ("loss at step 20", ["1", "0.5"]),
        ("learning rate at the start", ["0.1", "0.2"]),
        ("learning rate at the end", ["0.1", "0.2"]),
        ("interventions", ["2", "0"]),
        ("batches skipped", ["2", "0"]),
        ("rollbacks", ["0", "0"]),
        ("updates undone by rollbacks", ["0", "0"]),
        ("non-finite loss", ["2", "0"]),
        ("advice about", ["–", "dead relu"]),
        ("NaNGuard: quarantine", ["default", "True"]),
        ("lr", ["0.1", "0.2"]),
        ("depth", ["4", "–"]),
    ]


def test_runs_of_which_little_is_known() -> None:
    """Without curves and settings what is not known is a dash; a loss that ends as NaN is shown as it is."""
    lost = run_of(3, float("nan"), 0.1)
    rows = dict(compare([RunData(Path()), lost]))
    assert rows["loss at the end"] == ["–", "nan"]
    assert rows["learning rate at the start"] == ["–", "0.1"]
    assert not any(label.startswith("NaNGuard: ") for label in rows)


def test_names() -> None:
    """The shortest names that tell folders apart, without the folder that all runs have."""
    assert names_of([Path("a/x/nanguard"), Path("a/y/nanguard")]) == ["x", "y"]
    assert names_of([Path("runs/1"), Path("runs/deep/2/nanguard")]) == ["1", "deep/2/nanguard"]


def test_the_page(tmp_path: Path) -> None:
    """Each run has its colour in every curve and a mark for each intervention; nothing is loaded, names are text."""
    pytest.importorskip("matplotlib")
    runs = [read_run_data(write_run(tmp_path / name, HOSTILE)) for name in ("a", "b")]
    losses, norms, rates = draw_comparison(["a", "b"], runs).axes
    assert [axes.get_ylabel() for axes in (losses, norms, rates)] == ["loss", "gradient norm", "learning rate"]
    assert losses.get_legend_handles_labels()[1] == ["a", "not finite", "b"]
    assert len(rates.get_lines()) == 2
    assert [list(line.get_xdata()) for line in losses.get_lines()].count([60, 100]) >= 2
    text = comparison_page(["a", HOSTILE], runs)
    assert "2 runs compared" in text
    assert "<td>updates undone by rollbacks</td><td>20</td><td>20</td>" in text
    assert "<script" not in text
    assert "<img" not in text
    assert not re.findall(r'(?:href|src)\s*=\s*"(?!#)', text)

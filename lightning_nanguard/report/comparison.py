"""Compares runs: the settings that differ, the outcome of each, and their curves in one figure."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

from lightning_nanguard.record.curve import CurvePoint, final_points, thinned
from lightning_nanguard.record.html import table
from lightning_nanguard.record.text import in_words, printable
from lightning_nanguard.report.data import RunData
from lightning_nanguard.report.figure import (
    COLOURS,
    STYLE,
    add_curve,
    add_line,
    label_axes,
    legend,
    matplotlib,
    spread,
    stacked_axes,
    to_svg,
)
from lightning_nanguard.report.page import document, heading, verdict
from lightning_nanguard.thresholds.report import REPORT

Row = tuple[str, list[str]]
"""What is compared, and its value in each run."""

_NONE = "–"


def names_of(folders: Sequence[Path]) -> list[str]:
    """The shortest names that distinguish the folders of runs.

    Example:
        >>> names_of([Path("logs/version_0/nanguard"), Path("logs/version_1/nanguard")])
        ['version_0', 'version_1']
    """
    paths = [Path(os.path.abspath(folder)) for folder in folders]
    if all(path.name == "nanguard" for path in paths):
        paths = [path.parent for path in paths]
    common = os.path.commonpath(paths)
    return [os.path.relpath(path, common) for path in paths]


def compare(runs: Sequence[RunData]) -> list[Row]:
    """The rows of a comparison: outcome, loss, rates, interventions, and the settings that differ."""
    curves = [[one for one in run.curve if one.optimizer == 0] for run in runs]
    kept = [[one for one in run.kept if one.optimizer == 0] for run in runs]
    last = [max((one.step for one in curve), default=0) for curve in curves]
    rows: list[Row] = [
        ("outcome", [verdict(run)[0].partition(":")[0] for run in runs]),
        ("steps", [f"{step:,}" if curve else _NONE for step, curve in zip(last, curves, strict=True)]),
        ("loss at the end", [_loss(curve, step) for curve, step in zip(kept, last, strict=True)]),
    ]
    known = {step for step, curve in zip(last, curves, strict=True) if curve}
    if len(known) > 1:
        common = min(known)
        rows.append((f"loss at step {common:,}", [_loss(curve, common) for curve in kept]))
    rates = [[one.lr for one in curve if one.lr is not None] for curve in curves]
    rows += [
        ("learning rate at the start", [f"{known[0]:.4g}" if known else _NONE for known in rates]),
        ("learning rate at the end", [f"{known[-1]:.4g}" if known else _NONE for known in rates]),
        ("interventions", [_interventions(run) for run in runs]),
        ("batches skipped", [f"{run.remedies['skip']:,}" for run in runs]),
        ("rollbacks", [f"{run.remedies['restore']:,}" for run in runs]),
        ("updates undone by rollbacks", [f"{run.updates_lost:,}" for run in runs]),
    ]
    for fault in dict.fromkeys(one.fault for run in runs for one in run.interventions):
        counts = [sum(one.fault == fault for one in run.interventions) for run in runs]
        rows.append((in_words(fault), [f"{count:,}" for count in counts]))
    advice = [", ".join(sorted({in_words(one.finding.cause) for one in run.advice})) for run in runs]
    if any(advice):
        rows.append(("advice about", [causes or _NONE for causes in advice]))
    return [*rows, *_differing(runs, "settings", "NaNGuard: "), *_differing(runs, "hyperparameters", "")]


def _interventions(run: RunData) -> str:
    lost = f" and {run.unreadable:,} that cannot be read" if run.unreadable else ""
    return f"{len(run.interventions):,}{lost}"


def comparison_page(names: Sequence[str], runs: Sequence[RunData]) -> str:
    """A page with the rows as a table, and the curves of all runs in one figure.

    Returns:
        HTML without external files.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    rows = [(label, *values) for label, values in compare(runs)]
    title = f"{len(runs)} runs compared"
    figure = to_svg(draw_comparison(names, runs), "The curves of the runs")
    parts = [heading(title, None), f'<div class="wide">{table(("", *names), rows)}</div>', "<h2>Curves</h2>"]
    parts.append('<p class="quiet">A triangle at the top is an intervention, in the colour of its run.</p>')
    return document(title, [*parts, f'<div class="wide">{figure}</div>'])


def draw_comparison(names: Sequence[str], runs: Sequence[RunData]) -> Any:
    """Draw loss, gradient norm and learning rate of several runs over the steps, with one colour for each run.

    Returns:
        A ``matplotlib.figure.Figure``.
    """
    with matplotlib().rc_context(STYLE):
        losses, norms, rates = stacked_axes([3, 3, 2])
        colours = cycle(COLOURS[name] for name in ("first", "second", "back", "bad", "ink"))
        for name, run, colour in zip(names, runs, colours, strict=False):
            rows = thinned([one for one in run.curve if one.optimizer == 0], REPORT.points_per_curve)
            add_curve(losses, rows, "loss", colour, _short(printable(name), REPORT.characters_of_legend))
            add_curve(norms, rows, "grad_norm", colour, None)
            kept = final_points(rows)
            add_line(rates, kept, [one.lr for one in kept], color=colour)
            steps = [one.global_step for one in spread(run.interventions, REPORT.marks)]
            if steps:
                style = {"linestyle": "none", "marker": "v", "markersize": 5, "color": colour, "clip_on": False}
                losses.plot(steps, [1.0] * len(steps), transform=losses.get_xaxis_transform(), **style)
        label_axes(losses, norms, rates)
        legend(losses)
    return losses.figure


def _short(name: str, most: int) -> str:
    """A name, shortened at the beginning if it is too long, because the end distinguishes runs."""
    return name if len(name) <= most else f"…{name[1 - most :]}"


def _loss(curve: Sequence[CurvePoint], step: int) -> str:
    """Median loss of the last points up to a step; ``nan`` or ``inf`` if the last one is not finite."""
    known = [one.loss for one in curve if one.loss is not None and one.step <= step][-REPORT.rows_around :]
    finite = [loss for loss in known if math.isfinite(loss)]
    return f"{median(finite) if finite and math.isfinite(known[-1]) else known[-1]:.4g}" if known else _NONE


def _differing(runs: Sequence[RunData], kind: str, prefix: str) -> list[Row]:
    """Settings that are not the same in all runs. Settings that were not recorded are left out."""
    begun: list[Mapping[str, Any]] = [{} if run.log is None or not run.log.fits else run.log.fits[-1] for run in runs]
    known: list[Mapping[str, Any]] = [one if isinstance(one := fit.get(kind), dict) else {} for fit in begun]
    rows = []
    # Lightning's own entries begin with an underscore.
    for name in dict.fromkeys(name for settings in known for name in settings if not name.startswith("_")):
        values = [str(settings[name]) if name in settings else "default" if prefix else _NONE for settings in known]
        if len(set(values)) > 1 and all(known):
            rows.append((f"{prefix}{name}", values))
    return rows

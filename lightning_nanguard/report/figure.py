"""Draws a run with matplotlib: its interventions and rollbacks above its curves."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

from lightning_nanguard.errors import optional_module
from lightning_nanguard.record.curve import CurvePoint, final_points, thinned, trained_again
from lightning_nanguard.report.data import RunData
from lightning_nanguard.thresholds.report import REPORT
from lightning_nanguard.types import Intervention

# Readable on light and dark backgrounds. In the page each is replaced by the CSS variable of its name.
COLOURS = {"ink": "#6b7280", "first": "#2f80d0", "second": "#c77700", "bad": "#d6404f", "back": "#9a5fd0"}
"""The colours of the figure, by what they show."""

STYLE: dict[str, Any] = {
    "axes.edgecolor": COLOURS["ink"],
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": COLOURS["ink"],
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "font.size": 10,
    "grid.alpha": 0.25,
    "grid.color": COLOURS["ink"],
    "legend.frameon": False,
    "legend.labelcolor": COLOURS["ink"],
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "nanguard",
    "text.color": COLOURS["ink"],
    "text.parse_math": False,
    "xtick.color": COLOURS["ink"],
    "ytick.color": COLOURS["ink"],
}
"""What matplotlib is set to while it draws."""


AGAIN = "trained again after a resume"
"""The name of what is drawn faintly in the legend."""


def matplotlib(name: str = "matplotlib") -> ModuleType:
    """Import a module of matplotlib.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed. The message names the extra.
    """
    return optional_module(name, "Reports and plots need matplotlib", "report")


def draw(data: RunData, figure: Any = None) -> Any:
    """Draw loss, gradient norm with the clipping value, and learning rate of a run over the steps.

    Each intervention is a mark above the curves and a line through them. Each rollback is an arc to the step to which
    it went back.

    Args:
        data: The run.
        figure: A ``matplotlib.figure.Figure`` to draw on; ``None`` for a new one.

    Returns:
        The figure.
    """
    library = matplotlib()
    with library.rc_context(STYLE):
        marks, losses, norms, rates = stacked_axes([1, 3, 3, 2], figure)
        points = {
            index: thinned([one for one in data.curve if one.optimizer == index], REPORT.points_per_curve)
            for index in sorted({one.optimizer for one in data.curve})
        }
        for number, (index, all_rows) in enumerate(points.items()):
            rows = final_points(all_rows)
            colour = COLOURS["first" if number == 0 else "second"]
            name = f"optimizer {index}" if len(points) > 1 else None
            add_curve(losses, all_rows, "loss", colour, name)
            add_curve(norms, all_rows, "grad_norm", colour, name)
            add_line(rates, rows, [one.lr for one in rows], color=colour, label=name)
        clipped = [row.clip_val for rows in points.values() for row in rows]
        if any(value is not None for value in clipped):
            rows = final_points(next(iter(points.values())))
            add_line(
                norms, rows, [one.clip_val for one in rows], color=COLOURS["back"], linestyle="--", label="clipped at"
            )
        label_axes(losses, norms, rates)
        for axes in (losses, norms, rates):
            for number, step in enumerate(data.resumed_at):
                said = "resumed" if axes is losses and number == 0 else None
                axes.axvline(step, color=COLOURS["ink"], linewidth=0.9, linestyle=":", label=said)
            legend(axes)
        shown = list(spread(data.interventions, REPORT.marks))
        _mark(marks, shown, library)
        for axes in (losses, norms, rates):
            for one in shown:
                axes.axvline(one.global_step, color=_colour(one), linewidth=0.8, alpha=0.45)
    return rates.figure


def stacked_axes(heights: Sequence[int], figure: Any = None) -> Any:
    """Axes below each other with a common axis of steps.

    Args:
        heights: Their relative heights.
        figure: A ``matplotlib.figure.Figure``; ``None`` for a new one.
    """
    figure = matplotlib("matplotlib.figure").Figure() if figure is None else figure
    figure.set_size_inches(8.0, 7.2)
    figure.set_layout_engine("constrained")
    return figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)


def label_axes(losses: Any, norms: Any, rates: Any) -> None:
    """Name the axes of the curves, and choose their scales."""
    for axes, label in ((losses, "loss"), (norms, "gradient norm"), (rates, "learning rate")):
        axes.set_ylabel(label)
        scale(axes)
    rates.set_xlabel("step")


def to_svg(figure: Any, title: str = "The curves of the run and its interventions") -> str:
    """Convert a figure to an SVG element for a page, with the CSS variables of the page as colours.

    Args:
        figure: The figure that :func:`draw` made.
        title: Text alternative for screen readers. It must not come from a record.
    """
    buffer = io.StringIO()
    with matplotlib().rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)


def spread(interventions: Sequence[Intervention], most: int) -> Iterator[Intervention]:
    """Choose some of the interventions, spread over the run. Rollbacks and stops are preferred."""
    rare = [one for one in interventions if one.snapshot_step is not None or "stop" in one.remedies]
    common = [one for one in interventions if one.snapshot_step is None and "stop" not in one.remedies]
    rare = _every(rare, most)
    yield from rare
    yield from _every(common, most - len(rare))


def _every(items: list[Intervention], most: int) -> list[Intervention]:
    if most <= 0:
        return []
    stride = -(-len(items) // most)
    return items[::stride] if stride else []


def _colour(intervention: Intervention) -> str:
    return COLOURS["back" if intervention.snapshot_step is not None else "bad"]


def add_curve(axes: Any, rows: Sequence[CurvePoint], field: str, colour: str, name: str | None) -> None:
    """Add a curve, the largest values of joined rows behind it, and a mark at each value that is not finite.

    Args:
        axes: The axes.
        rows: The points.
        field: Name of the value, ``"loss"`` or ``"grad_norm"``.
        colour: Colour of the curve.
        name: Name of the curve in the legend; ``None`` for none.
    """
    again = trained_again(rows)
    if any(again):
        # Other points become ``None``, so that the line is broken where a fit ends.
        values = [getattr(one, field) if old else None for one, old in zip(rows, again, strict=True)]
        label = None if AGAIN in axes.get_legend_handles_labels()[1] else AGAIN
        add_line(axes, rows, values, color=colour, alpha=0.35, linewidth=0.8, label=label)
        rows = final_points(rows)
    largest = [getattr(one, f"{field}_max") for one in rows]
    if any(one.updates > 1 for one in rows):
        add_line(axes, rows, largest, color=colour, alpha=0.3, linewidth=0.7)
    add_line(axes, rows, [getattr(one, field) for one in rows], color=colour, label=name)
    bad = [one.step for one, value in zip(rows, largest, strict=True) if value is not None and not math.isfinite(value)]
    if bad:
        label = None if "not finite" in axes.get_legend_handles_labels()[1] else "not finite"
        style = {"linestyle": "none", "marker": "x", "color": COLOURS["bad"], "clip_on": False}
        axes.plot(bad, [1.0] * len(bad), transform=axes.get_xaxis_transform(), label=label, **style)


def add_line(axes: Any, rows: Sequence[CurvePoint], values: Sequence[float | None], **style: Any) -> None:
    """Add a line with gaps where a resumed run begins at an earlier step, and where no value is finite.

    ``style`` is for matplotlib's ``plot``.
    """
    xs: list[float] = []
    ys: list[float] = []
    for row, value in zip(rows, values, strict=True):
        if xs and row.step <= xs[-1]:
            xs.append(row.step)
            ys.append(math.nan)
        xs.append(row.step)
        # Matplotlib's scales fail with values close to the largest float64, so these are left out.
        ys.append(value if value is not None and abs(value) < 1e300 else math.nan)
    if any(map(math.isfinite, ys)):
        # With a marker, because a single value between two gaps would have no visible line.
        alone = {"marker": ".", "markersize": 4} if len(ys) < 30 else {}
        axes.plot(xs, ys, **{"linewidth": 1.2, **alone, **style})


def legend(axes: Any) -> None:
    """Put the legend above the axes at the left, where it hides no curve and is visible on a phone."""
    labels = axes.get_legend_handles_labels()[1]
    if labels:
        columns = max(1, min(len(labels), REPORT.characters_of_legend // max(map(len, labels))))
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.02), borderaxespad=0.0, ncols=columns)


def scale(axes: Any) -> None:
    """Choose the scale and the upper end of a vertical axis. Values far above the others are cut off."""
    lines = [line for line in axes.get_lines() if line.get_linestyle() != "None"]
    values = sorted(y for line in lines for y in line.get_ydata() if math.isfinite(y))
    if not values:
        return
    least, usual = values[0], values[int(REPORT.share_in_sight * (len(values) - 1))]
    end = max(usual * REPORT.axis_end_over_usual, 0.0)
    cut = 0 < end < values[-1]
    if least > 0 and min(values[-1], end) > REPORT.logarithmic_from * least:
        axes.set_yscale("log")
        # Plain numbers, because matplotlib's own labels are formulas, and formulas are turned off for names of layers.
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
        axes.yaxis.set_minor_formatter(lambda value, _: "")
    if cut:
        axes.set_ylim(top=end)


def _mark(axes: Any, interventions: Sequence[Intervention], library: ModuleType) -> None:
    """Draw the marks of interventions, with an arc from each rollback to the step to which it went back."""
    patches = matplotlib("matplotlib.patches")
    axes.set_ylim(-0.3, 1.3)
    axes.set_yticks([])
    axes.set_ylabel("guard")
    axes.grid(False)
    axes.spines["left"].set_visible(False)
    for one in interventions:
        step, back = one.global_step, one.snapshot_step
        axes.plot([step], [0.0], marker="^" if back is None else "s", markersize=5, color=_colour(one))
        if back is not None and back != step:
            path = library.path.Path([(step, 0.0), ((step + back) / 2, 2.0), (back, 0.0)], [1, 3, 3])
            style = {"arrowstyle": "-|>", "mutation_scale": 8, "linewidth": 1.2, "fill": False}
            axes.add_patch(patches.FancyArrowPatch(path=path, color=_colour(one), **style))
    marks = "▲ intervention, ■ rollback, with an arc to the step it went back to"
    axes.set_title(marks if interventions else "no interventions", fontsize=10, loc="left")

"""How much of a run its page and its figure show."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReportThresholds:
    """How much of a run its page and its figure show.

    Attributes:
        points_per_curve: Points of one curve at most; a figure is about as many pixels wide.
        marks: Interventions that the figure marks at most, spread over the run; more would hide the curves.
        interventions_in_full: Interventions that the page tells in full at most, the first of each kind before others.
        rows_around: Rows of the curves on each side of an intervention whose median loss is compared.
        layers: Layers of one incident whose norms the page shows, those that changed most first.
        layers_in_text: Layers that ``nanguard explain`` names at one intervention.
        advice: Pieces of advice that the page shows at most.
        logarithmic_from: Ratio of the largest to the smallest number of a curve from which its axis is logarithmic.
        characters_of_legend: Characters in one line of a legend; more do not fit above a curve.
        share_in_sight: Share of the numbers of a curve below the one that counts as the largest usual number.
        axis_end_over_usual: Ratio of the end of an axis to the largest usual number, where the largest is beyond it.
            One loss of 1e20 would flatten all that was learned.
    """

    points_per_curve: int = 1000
    marks: int = 150
    interventions_in_full: int = 60
    rows_around: int = 10
    layers: int = 16
    layers_in_text: int = 3
    advice: int = 50
    logarithmic_from: float = 20.0
    characters_of_legend: int = 60
    share_in_sight: float = 0.95
    axis_end_over_usual: float = 100.0


REPORT = ReportThresholds()
"""The values the report uses."""

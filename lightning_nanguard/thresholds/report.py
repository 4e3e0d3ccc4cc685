"""How much of a run its page, its figure and its summary show."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReportThresholds:
    """How much of a run its page, its figure and its summary show.

    Attributes:
        points_per_curve: Largest number of points of one curve. A figure is about as many pixels wide.
        marks: Largest number of interventions that the figure marks, spread over the run. More would hide the curves.
        interventions_in_full: Largest number of interventions that the page describes in full, the first of each kind
            before others.
        rows_around: Rows of the curves before and after an intervention whose median losses are compared.
        layers: Layers of one incident whose norms the page shows, those that changed most.
        layers_in_text: Layers that ``nanguard explain`` names at one intervention.
        advice: Largest number of pieces of advice on the page.
        logarithmic_from: Ratio of the largest to the smallest number of a curve at which its axis is logarithmic.
        characters_of_legend: Characters in one line of a legend. More do not fit above a curve.
        share_in_sight: Share of the numbers of a curve below its largest usual number.
        axis_end_over_usual: Ratio of the end of an axis to the largest usual number, if the curve goes higher.
            Otherwise one loss of 1e20 would flatten the rest of the curve.
        interventions_in_table: Interventions in the table of a notebook, the newest ones.
        least_updates_of_share: Updates before which no share of skipped updates is reported, because a share of a few
            says little.
        share_skipped_most: Share of skipped updates at which the summary begins with it.
        share_skipped_nearly_all: Share of skipped updates at which the summary says that almost nothing was learned.
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
    interventions_in_table: int = 20
    least_updates_of_share: int = 20
    share_skipped_most: float = 0.5
    share_skipped_nearly_all: float = 0.9


REPORT = ReportThresholds()
"""The values that are used. No guard is given others."""

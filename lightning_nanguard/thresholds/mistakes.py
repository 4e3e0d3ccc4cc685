"""When the first updates of a run show a mistake without NaN, and how much is examined."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MistakeThresholds:
    """When the first updates of a run show a mistake without NaN, and how much is examined.

    Attributes:
        updates: First updates that are observed.
        updates_between_rates: Updates between two readings of scheduled learning rates. A prime number, so that they do
            not meet a cyclic schedule at the same place each time.
        least_updates: Fewest updates of a shorter run that is judged at its end.
        most_modules: Calls of modules that are observed in one batch.
        batches: Batches of one epoch that are compared with each other. With fewer, repetitions are not reported.
        numbers_per_batch: Numbers of its first field by which a batch is recognised, unless they repeat.
        spread: Share of a field over which these numbers are spread. With the golden ratio they are at different places
            of the samples. At the same place, such as a corner, all images may be black.
        repeated: Share of the batches of one epoch that are repetitions, at which they are reported.
        looks_at_gradients: Updates of one optimizer in which its gradients are compared with those before the backward
            pass, until they are seen to be cleared.
        added: Updates in a row whose gradients were added to those before, at which this is reported.
        ended: Share of the highest rate in these updates, below which a schedule has ended.
        runs_on: Factor on the number of observed updates. A run whose schedule has ended must be at least so long to be
            reported.
        checked_numbers: Fewest numbers of a weight with which the guard tests whether it looks as it was initialised.
        most_numbers: Numbers of a weight that are examined, spread over it.
        most_weights: Matrices that are examined for this, and as many vectors.
        bound_slack: Tolerance for the bound of a uniform initialisation: the largest of n numbers is at least
            ``exp(-bound_slack / n)`` of the bound. Smaller ones have a chance of ``exp(-bound_slack)``, 1e-7.
        deviation_slack: Standard errors by which the standard deviation of a normal initialisation may differ.
        least_precision: Largest share of a standard deviation that this tolerance may be. If it is larger, nothing is
            decided.
        named_parts: Parts of a model that one message names.
    """

    updates: int = 64
    updates_between_rates: int = 7
    least_updates: int = 16
    most_modules: int = 4096
    batches: int = 8
    numbers_per_batch: int = 32
    spread: float = 0.618
    repeated: float = 0.4
    looks_at_gradients: int = 8
    added: int = 4
    ended: float = 0.01
    runs_on: float = 4.0
    checked_numbers: int = 32
    most_numbers: int = 2048
    most_weights: int = 8
    bound_slack: float = 16.0
    deviation_slack: float = 4.0
    least_precision: float = 0.1
    named_parts: int = 4


@dataclass(frozen=True)
class LabelThresholds:
    """How the guard tests whether labels depend on their inputs.

    Attributes:
        least_rows: Fewest rows with which labels are tested.
        most_rows: Rows that are compared, each with all others.
        most_columns: Numbers of each row that are compared.
        rows_per_class: Rows that at least two of the classes need.
        orders: Shuffled orders of the labels with which the right order is compared.
        deviations: Standard deviations over these orders by which the right order has to exceed their mean.
    """

    least_rows: int = 256
    most_rows: int = 2048
    most_columns: int = 2048
    rows_per_class: int = 16
    orders: int = 20
    deviations: float = 3.5

"""When the first updates of a run show a mistake that makes no NaN, and how much is looked at."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MistakeThresholds:
    """When the first updates of a run show a mistake that makes no NaN, and how much is looked at.

    Attributes:
        updates: Updates that are looked at; nothing is after them.
        updates_between_rates: Updates between two looks at scheduled learning rates; a prime, so that they do not
            meet a cyclic schedule at the same place each time.
        least_updates: Updates of a shorter run from which on it is judged at its end.
        most_modules: Calls of modules that are looked at in the first batch.
        batches: Batches that are compared with each other.
        small_batch: Bytes of the first batch up to which batches are kept themselves until they are compared; of
            larger ones some numbers are copied.
        fields_per_batch: Fields of a batch that it is known by again; the first may be a mask that is always the same.
        numbers_per_batch: Numbers of one field of a batch that it is known by again.
        least_batches: Batches of one epoch from which on they can be said to repeat.
        repeated: Share of the batches of one epoch that are repetitions, from which on they repeat.
        looks_at_gradients: Updates of one optimizer for which its gradients are looked at before they are added to,
            unless they are seen to be cleared.
        added: Updates in a row whose gradients were added to those before, from which on they add up.
        ended: Share of its highest rate in these updates, below which a schedule has ended.
        runs_on: Factor on the number of observed updates: a run whose schedule has ended has to be at least as long.
        checked_numbers: Numbers of a weight from which on it can be told whether it is as it was initialised.
        most_numbers: Numbers of it that are looked at, spread over it.
        most_weights: Weights that are looked at for this.
        bound_slack: How many of its largest numbers lie how near to the bound of a uniform initialisation: the largest
            of n numbers lies within ``bound_slack / n`` of it.
        deviation_slack: Standard errors by which the standard deviation of a normal initialisation may be off.
        least_precision: Largest share of a standard deviation that this slack may be, or it tells nothing.
        named_parts: Parts of a model that one message names.
    """

    updates: int = 64
    updates_between_rates: int = 7
    least_updates: int = 16
    most_modules: int = 4096
    batches: int = 8
    small_batch: int = 4 << 20
    fields_per_batch: int = 3
    numbers_per_batch: int = 32
    least_batches: int = 8
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
    """How it is told whether labels have anything to do with their inputs.

    Attributes:
        least_rows: Rows from which on it can be told.
        most_rows: Rows that are compared, each with each.
        most_columns: Numbers of each row that are compared.
        rows_per_class: Rows that at least two of the classes need.
        orders: Other orders of the labels that the right one is compared with.
        deviations: Standard deviations over those orders, by which the right one has to exceed their mean.
    """

    least_rows: int = 256
    most_rows: int = 2048
    most_columns: int = 2048
    rows_per_class: int = 16
    orders: int = 20
    deviations: float = 3.5

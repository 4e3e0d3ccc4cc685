"""How much is recorded, shown and kept."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RecordsThresholds:
    """How much is recorded, shown and kept.

    Attributes:
        interventions_in_memory: Interventions that ``NaNGuard.interventions`` holds; a record takes about 1 kB, and all
            of them are on disk.
        records_waiting_for_file: Records kept while the file cannot be written, about 1 kB each.
        seconds_between_syncs: Seconds in which at most one record waits for the disk, so that a burst of faults does
            not wait for it at every step.
        records_waiting_in_background: Records that wait for one slow sink; the oldest is dropped when one more comes.
        shown_per_kind: Interventions of one kind shown on the console before only the 2nd, 4th, 8th … of them are; the
            first says all that the others would.
        advice_per_fit: Pieces of advice taken in one fit; a module of many layers could give one a layer.
        numbers_per_message: Line numbers or sample indices spelled out in one message; the rest is counted.
    """

    interventions_in_memory: int = 1000
    records_waiting_for_file: int = 1000
    seconds_between_syncs: float = 1.0
    records_waiting_in_background: int = 100
    shown_per_kind: int = 1
    advice_per_fit: int = 100
    numbers_per_message: int = 8


RECORDS = RecordsThresholds()
"""The values the guard uses."""

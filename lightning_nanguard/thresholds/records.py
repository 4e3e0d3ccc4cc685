"""How much is recorded, shown and kept."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RecordsThresholds:
    """How much is recorded, shown and kept.

    Attributes:
        interventions_in_memory: Interventions that ``NaNGuard.interventions`` holds; a record takes about 1 kB, and all
            of them are on disk.
        bytes_per_file: Bytes after which a file of records is put aside and a new one begun; the one put aside before
            is dropped. A record has about 1 kB, so at least the newest 16,000 are on the disk.
        records_waiting_for_file: Records kept while the file cannot be written, about 1 kB each.
        seconds_between_syncs: Seconds in which at most one record waits for the disk, so that a burst of faults does
            not wait for it at every step.
        records_waiting_in_background: Records that wait for one slow sink; the oldest is dropped when one more comes.
        shown_per_kind: Interventions of one kind shown on the console before only the 2nd, 4th, 8th … of them are; the
            first says all that the others would.
        advice_per_fit: Pieces of advice taken in one fit; a module of many layers could give one a layer.
        curve_rows: Rows that the file of curves has at most, about 60 bytes each; past that, neighbours are joined. It
            is more than a screen has pixels.
        seconds_between_curve_writes: Seconds that readings wait before they are written: what a killed run loses. A
            write takes about a millisecond.
        readings_waiting_for_curve: Readings that wait at most, where updates take less than a millisecond.
        incidents_with_layer_norms: Incidents of one fit of which the norms of the layers are written.
        layers_per_incident: Layers of which norms are written, those with the largest change; models have thousands.
        interventions_in_table: Interventions in the table that a notebook shows, the newest.
        hyperparameters_per_run: Hyperparameters of the module and the data module that the log of a run takes.
        characters_per_hyperparameter: Characters of such a hyperparameter at most; longer ones are left out.
        least_updates_of_share: Updates before which no share of skipped updates is told; a share of a few says little.
        share_skipped_most: Share of skipped updates from which on the summary begins with it: less than half is learned
            from.
        share_skipped_nearly_all: Share of skipped updates from which on it says that almost nothing was learned.
        numbers_per_message: Line numbers or sample indices spelled out in one message; the rest is counted.
    """

    interventions_in_memory: int = 1000
    bytes_per_file: int = 1 << 24
    records_waiting_for_file: int = 1000
    seconds_between_syncs: float = 1.0
    records_waiting_in_background: int = 100
    shown_per_kind: int = 1
    advice_per_fit: int = 100
    curve_rows: int = 8192
    seconds_between_curve_writes: float = 10.0
    readings_waiting_for_curve: int = 4096
    incidents_with_layer_norms: int = 20
    layers_per_incident: int = 64
    interventions_in_table: int = 20
    hyperparameters_per_run: int = 100
    characters_per_hyperparameter: int = 200
    least_updates_of_share: int = 20
    share_skipped_most: float = 0.5
    share_skipped_nearly_all: float = 0.9
    numbers_per_message: int = 8


RECORDS = RecordsThresholds()
"""The values the guard uses."""

"""How much is recorded, shown and kept."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RecordsThresholds:
    """How much is recorded, shown and kept.

    Attributes:
        interventions_in_memory: Interventions that ``NaNGuard.interventions`` holds; a record takes about 1 kB, and all
            of them are on disk.
        bytes_per_file: Size at which a file of records is renamed and a new one begins. An older renamed file is
            deleted. A record has about 1 kB, so the disk holds at least the newest 16,000.
        records_waiting_for_file: Records that are kept while the file cannot be written, about 1 kB each.
        seconds_between_syncs: Seconds in which at most one record is synchronised to the disk, so that many faults in a
            row do not wait for it at every step.
        records_waiting_in_background: Records that may wait for one slow sink. If one more comes, the oldest is
            dropped.
        shown_per_kind: Interventions of one kind that the console shows in full. After them it shows only the 2nd, 4th,
            8th … in one line each.
        advice_per_fit: Pieces of advice that are given in one fit. A module with many layers could cause one for each
            layer.
        curve_rows: Largest number of rows in the file of curves, about 60 bytes each. Above it, neighbouring rows are
            merged. A screen has fewer pixels than this.
        seconds_between_curve_writes: Seconds after which new readings are written. A killed run loses at most these. A
            write takes about a millisecond.
        readings_waiting_for_curve: Readings that may wait to be written, if updates take less than a millisecond.
        incidents_with_layer_norms: Incidents of one fit for which the norms of the layers are written.
        layers_per_incident: Layers whose norms are written, those with the largest change. Some models have thousands.
        hyperparameters_per_run: Hyperparameters of the module and the data module that are written to the log of a run.
        characters_per_hyperparameter: Largest number of characters of such a hyperparameter. Longer ones are left out.
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
    hyperparameters_per_run: int = 100
    characters_per_hyperparameter: int = 200


RECORDS = RecordsThresholds()
"""The values that the guard uses by default."""

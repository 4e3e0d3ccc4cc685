"""A sink that writes the gradient norms of the layers in the updates before an incident."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from lightning_nanguard.record.base import Sink
from lightning_nanguard.record.files import append, float_or_none, read_whole, readable
from lightning_nanguard.thresholds.records import RECORDS, RecordsThresholds
from lightning_nanguard.types import SCHEMA_VERSION, Intervention, Kind, plain

LAYER_NORMS_FILE = "layer_norms.jsonl"
"""Name of the file in a run's folder."""

Norms = tuple[list[int], dict[str, list[float | None]]]
"""Numbers of updates, and the norm of each layer in each of them."""


@final
@dataclass(frozen=True, slots=True)
class LayerNorms:
    """The gradient norms of the layers in the updates before an intervention.

    Attributes:
        run: Id of the run.
        global_step: ``global_step`` of the intervention.
        fault: Kind of the fault.
        updates: Numbers of the updates, oldest first.
        layers: The norms of each layer in these updates; the layers that changed most come first.
    """

    run: str
    global_step: int
    fault: str
    updates: tuple[int, ...]
    layers: dict[str, tuple[float | None, ...]]


@final
class LayerNormsFile(Sink):
    """Appends the norms of the layers to a file, for the first intervention of each kind.

    Args:
        path: The file.
        read: Returns the norms of the newest updates.
        thresholds: Largest number of interventions, and of layers for each.
    """

    def __init__(self, path: Path, read: Callable[[], Norms], thresholds: RecordsThresholds = RECORDS) -> None:
        self._path = path
        self._read = read
        self._thresholds = thresholds
        self._seen: set[Kind] = set()

    def write(self, intervention: Intervention) -> None:
        """Write the norms of the newest updates, if this is the first intervention of its kind."""
        if intervention.kind in self._seen or len(self._seen) >= self._thresholds.incidents_with_layer_norms:
            return
        self._seen.add(intervention.kind)
        updates, layers = self._read()
        if not layers:
            return
        most_changed = sorted(layers, key=lambda layer: _change(layers[layer]), reverse=True)
        entry = {
            "schema": SCHEMA_VERSION,
            "run": intervention.run,
            "global_step": intervention.global_step,
            "fault": intervention.fault,
            "updates": updates,
            "layers": {layer: layers[layer] for layer in most_changed[: self._thresholds.layers_per_incident]},
        }
        with contextlib.suppress(OSError):  # the sink of the records already warns
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "a+b", buffering=0) as file:
                append(file, json.dumps(plain(entry), allow_nan=False).encode() + b"\n")

    def close(self) -> None:
        """Forget which kinds were written, so that the next fit writes them again."""
        self._seen.clear()


def read_layer_norms(path: Path) -> list[LayerNorms]:
    """Read a file of :class:`LayerNormsFile`, oldest first. Lines that cannot be read are left out.

    Args:
        path: The file; it need not exist.
    """
    return readable(read_whole(path), _parsed) if path.is_file() else []


def _parsed(entry: Mapping[str, Any]) -> LayerNorms:
    layers = {str(name): tuple(map(float_or_none, norms)) for name, norms in entry["layers"].items()}
    updates = tuple(map(int, entry["updates"]))
    return LayerNorms(str(entry["run"]), int(entry["global_step"]), str(entry["fault"]), updates, layers)


def _change(norms: Sequence[float | None]) -> float:
    """The change from the smallest norm to the last one; infinite if one is not finite."""
    known = [norm for norm in norms if norm is not None]
    if not known or not all(map(math.isfinite, known)):
        return math.inf if known else 0.0
    smallest, last = min(known), known[-1]
    return last / smallest if smallest > 0 else math.inf if last > 0 else 0.0

"""The gradient norms of the layers before an incident are written once for each kind of incident."""

from __future__ import annotations

import math
from pathlib import Path

from lightning_nanguard.record.layer_norms import LAYER_NORMS_FILE, LayerNorms, LayerNormsFile, read_layer_norms
from lightning_nanguard.thresholds.records import RecordsThresholds
from tests.record.data import ROLLBACK, SKIP, step

NORMS = ([6, 7, 8], {"steady": [1.0, 1.1, 1.0], "grew": [1.0, 5.0, 50.0], "broke": [1.0, None, math.nan]})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """The layers come with what changed most first, NaN and what had no gradient included; too many are left out."""
    path = tmp_path / "deeper" / LAYER_NORMS_FILE
    sink = LayerNormsFile(path, lambda: NORMS, RecordsThresholds(layers_per_incident=2))
    sink.write(SKIP)
    (found,) = read_layer_norms(path)
    assert (found.global_step, found.fault, found.updates) == (412, "non_finite_gradient", (6, 7, 8))
    assert list(found.layers) == ["broke", "grew"]
    assert found.layers["grew"] == (1.0, 5.0, 50.0)
    assert repr(found.layers["broke"]) == "(1.0, None, nan)"


def test_each_kind_once_and_not_too_many(tmp_path: Path) -> None:
    """A thousand incidents of a kind are one line; there are no more lines than allowed; the next fit begins anew."""
    path = tmp_path / LAYER_NORMS_FILE
    sink = LayerNormsFile(path, lambda: NORMS, RecordsThresholds(incidents_with_layer_norms=2))
    for number in range(1000):
        sink.write(step(number))
    sink.write(ROLLBACK)
    sink.write(step(7, fault="another"))
    assert [found.fault for found in read_layer_norms(path)] == ["non_finite_gradient", "exploding_loss"]
    sink.close()
    sink.write(SKIP)
    assert len(read_layer_norms(path)) == 3


def test_nothing_to_write_and_nowhere(tmp_path: Path) -> None:
    """Before the first update nothing is written; a folder that cannot be made costs nothing."""
    LayerNormsFile(tmp_path / LAYER_NORMS_FILE, lambda: ([], {})).write(SKIP)
    assert not (tmp_path / LAYER_NORMS_FILE).exists()
    (tmp_path / "file").write_text("")
    LayerNormsFile(tmp_path / "file" / "x" / LAYER_NORMS_FILE, lambda: NORMS).write(SKIP)
    assert read_layer_norms(tmp_path / "none") == []


def test_torn_lines_are_left_out(tmp_path: Path) -> None:
    """A line cut short, or one of something else, costs that line alone."""
    path = tmp_path / LAYER_NORMS_FILE
    sink = LayerNormsFile(path, lambda: NORMS)
    path.write_bytes(b'[]\n{"run": 1\n')
    sink.write(SKIP)
    (found,) = read_layer_norms(path)
    assert isinstance(found, LayerNorms)

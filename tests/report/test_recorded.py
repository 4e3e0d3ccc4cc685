"""What the recorder saw around an intervention, in words."""

from __future__ import annotations

from dataclasses import replace
from math import inf, nan
from pathlib import Path

from lightning_nanguard.report.data import RunData, read_run_data
from lightning_nanguard.report.recorded import recorded_around
from tests.report.runs import write_run


def test_the_loss_and_the_layers(tmp_path: Path) -> None:
    """The loss before and after it, and the first and last norm of the layers that changed most; without curves and
    norms there is nothing to say."""
    data = read_run_data(write_run(tmp_path))
    first, second = data.interventions
    loss, norms = recorded_around(first, data)
    assert loss.startswith("loss 0.5")
    assert loss.endswith(" after (medians of up to 10 recorded losses)")
    assert norms == "gradient norms in the last 2 updates: net.0 0.5 → nan"
    assert len(recorded_around(second, data)) == 1  # no norms were kept there
    assert recorded_around(first, RunData(tmp_path)) == []
    layers = {"a": (nan, nan), "b": (inf, nan), "c": (1.0, inf)}
    lost = replace(data, layer_norms=[replace(data.layer_norms[0], layers=layers)])
    assert recorded_around(first, lost)[1].endswith(": c 1 → inf")  # the others were lost before


def test_many_layers_are_counted(tmp_path: Path) -> None:
    """Those that changed most are named, and the others counted."""
    data = read_run_data(write_run(tmp_path))
    layers = {f"layer.{number}": (1.0, 2.0) for number in range(9)}
    many = replace(data, layer_norms=[replace(data.layer_norms[0], layers=layers)])
    words = recorded_around(data.interventions[0], many)[1]
    assert words.endswith(": layer.0 1 → 2, layer.1 1 → 2, layer.2 1 → 2, and 6 more")

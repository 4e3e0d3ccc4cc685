"""A guard shows its settings, what it did, and the curves of its run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pytorch_lightning import Callback

from lightning_nanguard import Advice, Budget, Finding, NaNGuard, StopTraining
from lightning_nanguard.trainer.fit_summary import NO_FIT
from tests.helpers import fit, task, with_bad

ROOT = Path(__file__).parents[2]


class Drawn(Callback):
    """Draws the run while it goes on."""

    def __init__(self, guard: NaNGuard) -> None:
        self.guard = guard
        self.steps = 0

    def on_train_batch_end(self, trainer: object, module: object, outputs: object, batch: object, index: int) -> None:
        if index == 6:
            self.steps = len(self.guard.plot().axes[1].get_lines()[0].get_xdata())


def test_settings_in_the_repr() -> None:
    """The repr names what was changed, the parts by their names, and no default number."""
    assert repr(NaNGuard()) == (
        "NaNGuard(act_on='certain', observe=False, detectors=[NonFinite, GradientSpike, DivergingLoss], "
        "remedies=[Rollback, ClipGradients, ReduceLR])"
    )
    guard = NaNGuard(remedies=[StopTraining()], max_snapshots=5, dirpath="runs", budget=Budget(3), sinks=[print])
    said = repr(guard)
    for words in ("remedies=[StopTraining]", "max_snapshots=5", "dirpath='runs'", "budget=Budget(", "sinks=[print]"):
        assert words in said
    assert "readback" not in said
    assert "remedies=[]" in repr(NaNGuard(remedies=[]))


def test_summary_display_and_plot(tmp_path: Path) -> None:
    """In a fit and after it the guard says in one line what it did, shows it as HTML, and draws the curves."""
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot as plt

    guard = NaNGuard()
    assert guard.summary() == NO_FIT
    with pytest.raises(RuntimeError, match="call it during or after a fit"):
        guard.plot()
    drawn = Drawn(guard)
    fit(task(), with_bad(4, count=8), guard, folder=tmp_path, callbacks=[drawn])
    assert drawn.steps >= 6
    assert "8 updates watched" in guard.summary()
    guard._memory.take_advice([Advice(0, 0, "preflight", Finding("dead_relu", 0.9))])
    assert "; advice: dead relu;" in guard.summary()
    assert "1 intervention (non-finite loss 1): 1 batch skipped" in guard.summary()
    shown = guard._repr_html_()
    for words in ("1 batch skipped", "<td>skipped the batch</td>", "<td>remedies</td>"):
        assert words in shown
    assert "<td>skipped the batch</td>" in guard.interventions._repr_html_()  # type: ignore[attr-defined]
    figure = guard.plot()
    assert len(figure.axes) == 4
    assert list(figure.axes[0].get_lines()[0].get_xdata()) == [guard.interventions[0].global_step]
    plt.close("all")


_FORKS = """
import sys
from lightning_nanguard import NaNGuard
from tests.helpers import task, trainer_for, with_bad
from torch.utils.data import DataLoader

guard = NaNGuard()
trainer = trainer_for(sys.argv[1], guard, strategy="ddp_fork")
trainer.fit(task(), DataLoader(with_bad(4, count=8), batch_size=None))
print("SUMMARY", guard.summary(), guard.run_dir)
print("SHOWN", guard._repr_html_().replace(chr(10), " "))
"""


def test_a_fit_in_other_processes(tmp_path: Path) -> None:
    """The guard of the program does not say that there were no interventions, but where the records are."""
    command = [sys.executable, "-W", "ignore", "-c", _FORKS, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    (said,), (shown,) = ([one for one in done.stdout.splitlines() if one.startswith(w)] for w in ("SUMMARY", "SHOWN"))
    assert said == f"SUMMARY {NO_FIT} None"
    assert "no interventions" not in said + shown
    (records,) = tmp_path.rglob("interventions.jsonl")
    assert len(records.read_text().splitlines()) == 1

"""A guard shows its settings, what it did, and the curves of its run."""

from __future__ import annotations

from pathlib import Path

import pytest
from pytorch_lightning import Callback

from lightning_nanguard import Advice, Budget, Finding, NaNGuard, StopTraining
from tests.helpers import fit, task, with_bad


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
    assert guard.summary() == 'NaNGuard: 0 updates watched (act_on="certain"), no interventions'
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

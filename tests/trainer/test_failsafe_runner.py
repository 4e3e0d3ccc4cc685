"""An error of the guard around a micro-batch costs the guard, and an error of the user's is the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from lightning_nanguard import NaNGuard
from lightning_nanguard.trainer.repeat.step_runner import StepRunner
from lightning_nanguard.trainer.repeat.updates_again import UpdatesAgain
from tests.helpers import Batch, Task, batches, differences, fit, mlp, state_of, task

pytestmark = pytest.mark.failing_guard


@pytest.mark.parametrize(("owner", "name"), [(StepRunner, "_guarded"), (UpdatesAgain, "keep")])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_a_micro_batch_is_run_once(
    owner: type, name: str, accumulated: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the guard fails before or after it, the run is bit for bit the one without a guard."""
    options = {"accumulate_grad_batches": accumulated}
    bare = fit(task(), batches(count=12), folder=tmp_path / "bare", **options)
    original, calls = getattr(owner, name), 0

    def broken(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise LookupError("a fault of the guard")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, broken)
    guard = NaNGuard()
    run = fit(task(), batches(count=12), guard, folder=tmp_path / "guarded", **options)
    assert differences(state_of(bare), state_of(run)) == []
    assert [one.finding.cause for one in guard.advice] == ["guard_failed"]


def test_an_error_of_the_user_ends_the_run(tmp_path: Path) -> None:
    """An exception of ``training_step`` is raised as it was, also after the step was run again for it."""

    class Raises(Task):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            if batch_idx == 4:
                raise LookupError("a mistake of the user's")
            return super().training_step(batch, batch_idx)

    guard = NaNGuard()
    with pytest.raises(LookupError, match="a mistake of the user's"):
        fit(Raises(mlp()), batches(count=8), guard, folder=tmp_path)
    assert not guard.advice

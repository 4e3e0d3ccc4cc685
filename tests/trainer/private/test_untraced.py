"""Code of the user's that is run once more leaves nothing behind."""

from __future__ import annotations

from typing import Any

import torch

from lightning_nanguard.trainer.private.untraced import untraced
from tests.helpers import batches, copied, differences, learner_of, random_state
from tests.trainer.private.during import during_fit


def test_what_a_step_touches_is_put_back() -> None:
    """Buffers, metrics, logged values, random streams and plain attributes are as before."""

    def look(trainer: Any, module: Any) -> None:
        module.note = ["as it was"]
        before = copied(learner_of(trainer, module)), dict(trainer.callback_metrics), random_state()
        with untraced(trainer, module):
            torch.rand(1)
            module.note = "changed"
            module.training_step(batches(count=3)[2], 0)
        after = learner_of(trainer, module), dict(trainer.callback_metrics), random_state()
        assert differences(before, after) == []
        assert module.note == ["as it was"]

    during_fit(look, "norm")

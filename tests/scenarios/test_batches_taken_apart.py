"""Steps that take their batch apart (``batch.pop("labels")``) are guarded like all others."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_nanguard import NaNGuard, SkipStep
from lightning_nanguard.act.defaults import default_remedies
from tests.helpers import Run, Task, batches, differences, fit, mlp, samples, state_of, with_bad, words
from tests.modules import sgd


def collated(rows: list[Any]) -> dict[str, Tensor]:
    return {"x": torch.stack([x for x, _ in rows]), "labels": torch.stack([y for _, y in rows])}


def loader(*bad: int) -> DataLoader[Any]:
    return DataLoader(samples(with_bad(*bad) if bad else batches(count=24)), batch_size=8, collate_fn=collated)


class TakesApart(Task):
    """Removes the targets from its batch, or reads them."""

    def __init__(self, *, pops: bool, reaction: str = "", rate: float = 0.01) -> None:
        super().__init__(mlp(), lambda parameters: sgd(parameters, lr=rate))
        self.pops, self.reaction = pops, reaction
        self.left: list[list[str]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        labels = batch.pop("labels") if self.pops else batch["labels"]
        if self.reaction == "in place":
            batch["x"].mul_(1.0)
        if self.reaction in ("raises", "in place") and not bool(batch["x"].isfinite().all()):
            raise KeyError("an exception of the user's own")
        loss = self.loss((batch["x"], labels), "loss")
        # The square root of zero has an infinite slope, and its loss is finite.
        spoils = self.reaction == "gradient" and not bool(batch["x"].isfinite().all())
        return loss.nan_to_num(1.0) + (self.net[0].weight * 0).square().sum().sqrt() if spoils else loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.left.append(sorted(batch))


def run(folder: Path, guard: NaNGuard, bad: tuple[int, ...], *, pops: bool, **options: Any) -> Run:
    settings = {name: options.pop(name) for name in ("reaction", "rate") if name in options}
    torch.manual_seed(0)
    return fit(TakesApart(pops=pops, **settings), loader(*bad), guard, folder=folder, **options)


CASES: dict[str, dict[str, Any]] = {
    "loss": {},
    "raises": {"reaction": "raises"},
    "in place": {"reaction": "in place"},
    "gradient": {"reaction": "gradient"},
    "window": {"accumulate_grad_batches": 3},
    "window with a bad gradient": {"accumulate_grad_batches": 3, "reaction": "gradient"},
    "deferred": {"guard": {"readback": "deferred"}},
    "good samples": {"guard": {"remedies": [SkipStep(keep_good_samples=True), *default_remedies()]}},
    "diverges": {"rate": 1e6, "max_epochs": 3, "bad": ()},
    "trial": {"rate": 3.0, "max_epochs": 6, "bad": (), "guard": {"act_on": "evidence"}},
}


@pytest.mark.parametrize("case", CASES)
def test_as_if_the_step_only_read_its_batch(case: str, tmp_path: Path) -> None:
    """Records, causes and weights are those of a step that reads it, and hooks get the batch as the step left it."""
    options = {"bad": (5, 13)} | CASES[case]
    bad, settings = options.pop("bad"), options.pop("guard", {})
    guards = [NaNGuard(**settings) for _ in range(2)]
    runs = [
        run(tmp_path / str(pops), guard, bad, pops=pops, **options)
        for guard, pops in zip(guards, (False, True), strict=True)
    ]
    seen, told = ([(one.fault, one.cause, one.remedies) for one in guard.interventions] for guard in guards)
    assert told == seen
    assert told
    assert differences(*map(state_of, runs)) == []
    assert all(one == ["x"] for one in runs[1].module.left)
    assert len(runs[1].module.left) == len(runs[0].module.left) > 0


def test_the_cause_of_an_exception_and_of_a_bad_gradient(tmp_path: Path) -> None:
    """Both are found, although the fields are no longer in the batch when it is over."""
    for reaction, cause in (("raises", "non_finite_input"), ("gradient", "sqrt_at_zero")):
        guard = NaNGuard()
        left = run(tmp_path / reaction, guard, (5,), pops=True, reaction=reaction)
        assert words(guard) == [("skip",)]
        assert [one.cause for one in guard.interventions] == [cause]
        assert all(math.isfinite(float(one.detach().sum())) for one in left.module.parameters())

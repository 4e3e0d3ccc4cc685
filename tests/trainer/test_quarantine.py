"""Known bad samples are left out from then on; the others keep their order, and batches their number."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from lightning_nanguard import NaNGuard
from tests.helpers import copied, fp16, learner_of, same_bits, trainer_for
from tests.trainer.test_sample_finder import LogTargets, Stream, rows

BAD = {7: math.nan, 20: math.inf, 33: -1.0, 61: -2.0}
DATA = rows(x7=math.nan, x20=math.inf, y33=-1.0, y61=-2.0)


class Held(Callback):
    """Notes which rows each batch holds, by the content of its samples."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.after: list[Any] = []
        self._row = {self._key(x, y): row for row, (x, y) in enumerate(DATA)}

    @staticmethod
    def _key(x: torch.Tensor, y: torch.Tensor) -> str:
        return str((x.tolist(), y.tolist()))

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
        self.batches.append([self._row[self._key(x, y)] for x, y in zip(*batch, strict=True)])

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        self.after.append(copied(learner_of(trainer, module)))


def loader(data: Any = DATA, size: int = 8, **options: Any) -> DataLoader[Any]:
    return DataLoader(data, batch_size=size, **({"shuffle": True} | options))


def run(folder: Path, data: DataLoader[Any], guard: NaNGuard, ckpt: Path | None = None, **options: Any) -> Held:
    held = Held()
    torch.manual_seed(1)
    trainer_for(folder, guard, [held], **({"max_epochs": 2} | options)).fit(LogTargets(), data, ckpt_path=ckpt)
    if "save" not in options:
        held.trainer = guard  # type: ignore[attr-defined]
    return held


def epochs(held: Held, count: int) -> tuple[list[list[int]], list[list[int]]]:
    return held.batches[:count], held.batches[count:]


@pytest.mark.parametrize(
    "options",
    [{}, {"num_workers": 2}, {"num_workers": 1, "persistent_workers": True}],
    ids=["alone", "workers", "persistent workers"],
)
def test_the_second_epoch_is_clean(options: dict[str, Any], tmp_path: Path) -> None:
    """Rows met in the first epoch are missing in the second, all else is as without, and nothing has to be done."""
    plain = run(tmp_path, loader(**options), NaNGuard(dirpath=tmp_path / "a"))
    guard = NaNGuard(dirpath=tmp_path / "b", quarantine=True)
    held = run(tmp_path, loader(**options), guard)
    assert len(held.batches) == len(plain.batches) == 24
    without = [[row for row in batch if row not in BAD] for batch in plain.batches]
    assert held.batches[12:] == without[12:]
    assert {row for batch in held.batches[:12] for row in batch} >= set(BAD)
    assert {one.epoch for one in guard.interventions} == {0}


def test_a_stream_leaves_samples_out_by_their_hash(tmp_path: Path) -> None:
    """Where there are no rows, samples are recognised after they were loaded."""
    guard = NaNGuard(dirpath=tmp_path, quarantine=True)
    held = run(tmp_path, loader(Stream(DATA), shuffle=False), guard)
    assert held.batches[12:] == [[row for row in batch if row not in BAD] for batch in held.batches[:12]]
    assert {one.epoch for one in guard.interventions} == {0}


def test_a_resumed_run_leaves_out_what_it_knew(tmp_path: Path) -> None:
    """From the first batch on; a run that is resumed without quarantine meets them again."""
    first = NaNGuard(dirpath=tmp_path / "a", quarantine=True)
    torch.manual_seed(1)
    trainer = trainer_for(tmp_path, first, max_epochs=1)
    trainer.fit(LogTargets(), loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    for name, quarantine in (("b", True), ("c", False)):
        guard = NaNGuard(dirpath=tmp_path / name, quarantine=quarantine)
        held = run(tmp_path, loader(num_workers=1), guard, tmp_path / "end.ckpt")
        assert len(held.batches) == 12
        assert any(row in BAD for batch in held.batches for row in batch) is not quarantine
        assert bool(guard.interventions) is not quarantine


@pytest.mark.parametrize("stream", [False, True], ids=["rows", "stream"])
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_a_batch_of_which_nothing_is_left_is_passed_over(stream: bool, precision: str, tmp_path: Path) -> None:
    """It changes nothing of the learner, as a skipped one does, and is no intervention; the clock goes on."""
    guard = NaNGuard(dirpath=tmp_path, quarantine=True)
    data = [DATA[row] for row in (0, 1, 7, 33, 2, 3)]
    module = LogTargets()
    module.net[1] = torch.nn.Identity()
    held = Held()
    held._row = {held._key(x, y): row for row, (x, y) in enumerate(data)}
    plugins = {"plugins": [fp16()]} if precision == "16-mixed" else {}
    source = loader(Stream(data) if stream else data, size=2, shuffle=False)
    trainer = trainer_for(tmp_path, guard, [held], max_epochs=3, **plugins)
    torch.manual_seed(1)
    trainer.fit(module, source)
    assert [len(batch) for batch in held.batches] == [2] * 9
    assert {one.epoch for one in guard.interventions} == {0}
    assert trainer.global_step == 9
    for at in (4, 7):
        before, after = held.after[at - 1], held.after[at]
        assert same_bits(before, after)
        assert not same_bits(after, held.after[at + 1])


def test_a_micro_batch_of_which_nothing_is_left(tmp_path: Path) -> None:
    """The update is the mean over the others of its window, and a window of such batches is passed over."""

    def train(data: list[Any], accumulate: int, epochs: int, **options: Any) -> tuple[list[Any], NaNGuard]:
        guard, held = NaNGuard(dirpath=tmp_path / str(len(data)), **options), Held()
        held._row = {held._key(x, y): row for row, (x, y) in enumerate(data)}
        module = LogTargets()
        module.net[1] = torch.nn.Identity()
        trainer_for(tmp_path, guard, [held], max_epochs=epochs, accumulate_grad_batches=accumulate).fit(
            module, loader(data, size=2, shuffle=False)
        )
        return held.after, guard

    data = [DATA[row] for row in (0, 1, 7, 33, 2, 3, 20, 61, 7, 33, 33, 7)]
    mixed, guard = train(data, 3, 2, quarantine=True)
    good, _ = train([data[row] for row in (0, 1, 4, 5)], 2, 2)
    assert {one.epoch for one in guard.interventions} == {0}
    ends = [mixed[-1]["parameters"], good[-1]["parameters"]]
    for one, other in zip(*(end.values() for end in ends), strict=True):
        torch.testing.assert_close(one, other)


def test_off_by_default_and_only_observed(tmp_path: Path) -> None:
    """Nothing is left out unless asked for, nor where the guard only observes."""
    for name, options in (("a", {}), ("b", {"quarantine": True, "observe": True})):
        held = run(tmp_path, loader(), NaNGuard(dirpath=tmp_path / name, **options))
        assert all(len(batch) == 8 for batch in held.batches)
    with pytest.raises(ValueError, match="quarantine='yes'"):
        NaNGuard(quarantine="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"num_workers": 1, "persistent_workers": True}], ids=["here", "worker"])
def test_validation_keeps_all_samples(options: dict[str, Any], tmp_path: Path) -> None:
    """Where one loader serves for training and validation, only training leaves samples out."""

    class Counts(LogTargets):
        def validation_step(self, batch: Any, index: int) -> None:
            counted.append(len(batch[0]))

    counted: list[int] = []
    both, guard = loader(shuffle=False, **options), NaNGuard(dirpath=tmp_path, quarantine=True)
    held = Held()
    trainer_for(tmp_path, guard, [held], max_epochs=2).fit(Counts(), both, both)
    assert sum(map(len, held.batches[-len(both) :])) == len(DATA) - len(BAD)
    assert sum(counted) == 2 * len(DATA)

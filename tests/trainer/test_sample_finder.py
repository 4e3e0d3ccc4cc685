"""The bad samples of a run are named by their rows, else by hash and place, and no good one ever is."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, default_collate

from lightning_nanguard import NaNGuard, SkipStep, sample_hash
from lightning_nanguard.act.defaults import default_remedies
from lightning_nanguard.record.bad_samples import BAD_SAMPLES_FILE, BadSample, merged, read_bad_samples
from lightning_nanguard.record.messages import origin_in_words
from lightning_nanguard.thresholds import Thresholds
from tests.helpers import folder_of, trainer_for
from tests.modules import update_by_hand

Sample = tuple[Tensor, Tensor]


def rows(count: int = 96, **bad: Any) -> list[Sample]:
    """Samples of a regression with positive targets; ``bad`` says in which rows what stands: ``x7=nan``, ``y9=-1``."""
    source = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        x = torch.randn(4, generator=source)
        made.append((x, x[:1].abs() + 0.5))
    for place, value in bad.items():
        field, row = place[0], int(place[1:])
        x, y = (part.clone() for part in made[row])
        (x if field == "x" else y)[0] = value
        made[row] = (x, y)
    return made


class LogTargets(LightningModule):
    """Learns the logarithm of the target, which a negative one has not."""

    def __init__(self, manual: bool = False, tolerant: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
        self.automatic_optimization = not manual
        self.tolerant = tolerant

    def training_step(self, batch: Any, index: int) -> Tensor | None:
        x, y = batch
        if self.tolerant:
            x = x.nan_to_num(0.0)
        loss = (self.net(x) - y.log()).square().mean()
        if self.automatic_optimization:
            return loss
        update_by_hand(self, loss)
        return None

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05)


def trained(data: Any, folder: Path, module: LightningModule | None = None, **options: Any) -> NaNGuard:
    guard = NaNGuard(dirpath=folder, **options.pop("guard", {}))
    loader = data if isinstance(data, DataLoader) else DataLoader(data, batch_size=8, shuffle=True)
    torch.manual_seed(1)
    trainer_for(folder, guard, **options).fit(module or LogTargets(), loader)
    return guard


def listed(guard: NaNGuard) -> list[BadSample]:
    path = folder_of(guard) / BAD_SAMPLES_FILE
    return merged(read_bad_samples(path)) if path.exists() else []


BAD: Mapping[str, float] = {"x7": math.nan, "y20": math.inf, "x50": 1e15, "y33": -1.0, "y61": -2.0}


def test_rows_are_named_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """NaN, Inf, and targets that only the loss shows to be bad are each listed by row, with how often they were met."""
    with caplog.at_level(logging.WARNING, logger="lightning_nanguard"):
        guard = trained(rows(**BAD), tmp_path, max_epochs=3)
    found = listed(guard)
    assert {7, 20, 33, 61} <= {one.row for one in found} <= {7, 20, 33, 50, 61}
    assert [one.times for one in found if one.row != 50] == [3] * 4
    assert [one.cause for one in found][:2] == ["not finite", "not finite"]
    assert found[0].columns == {"0": (0,)}
    assert all(one.run == guard.run_id and one.rank == 0 for one in found)
    named = [one.finding for one in guard.interventions if one.finding is not None and 7 in one.finding.rows]
    assert [one.evidence.get("times_met") for one in named] == [None, 2.0, 3.0]
    assert all(len(one.rows) == len(one.samples) for one in named)
    assert "row 7 of the data set" in caplog.text or "rows 7" in caplog.text


@pytest.mark.parametrize(
    "options",
    [{"accumulate_grad_batches": 3}, {"guard": {"readback": "deferred"}}],
    ids=["accumulated", "deferred"],
)
def test_the_same_rows_however_it_is_trained(options: dict[str, Any], tmp_path: Path) -> None:
    """Every row that is not finite is listed by the end of the first epoch, and no good one."""
    found = {one.row for one in listed(trained(rows(x7=math.nan, y20=math.inf, x64=-math.inf), tmp_path, **options))}
    assert found == {7, 20, 64}


def test_manual_optimization(tmp_path: Path) -> None:
    """Where no batch can be run again, rows are named by what they hold."""
    found = listed(trained(rows(x7=math.nan, y20=math.inf), tmp_path, LogTargets(manual=True)))
    assert [one.row for one in found] == [7, 20]


def test_what_the_model_takes_is_not_bad(tmp_path: Path) -> None:
    """Rows whose NaN stands for what is missing are not listed, not even from a batch that another row spoils."""
    missing = {f"x{row}": math.nan for row in range(0, 96, 4)}
    found = listed(trained(rows(**missing, y33=math.inf), tmp_path, LogTargets(tolerant=True)))
    assert [one.row for one in found] == [33]


class NormalisesSelf(LogTargets):
    """Divides by the spread of its batch, by a function or by hand."""

    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.by_hand = by_hand
        self.net = nn.Linear(4, 1)

    def training_step(self, batch: Any, index: int) -> Tensor | None:
        x, y = batch
        centred = x - x.mean(0)
        spread = (centred.square().sum(0) / (len(x) - 1)).sqrt() if self.by_hand else x.std(0)
        return super().training_step((centred / spread, y), index)


@pytest.mark.filterwarnings("ignore:std.*degrees of freedom")
@pytest.mark.parametrize("by_hand", [True, False])
def test_a_fault_of_the_size_of_a_batch_is_none_of_its_rows(by_hand: bool, tmp_path: Path) -> None:
    """The row of a batch of one is bad only if it is bad among other rows, too."""
    for bad, named in (({}, []), ({"y96": -1.0}, [96])):
        guard = trained(
            DataLoader(rows(97, **bad), batch_size=8), tmp_path / str(len(bad)), NormalisesSelf(by_hand), max_epochs=2
        )
        found = listed(guard)
        assert [one.row for one in found] == named
        assert len(guard.interventions) == 2
        for one in guard.interventions:
            assert one.finding is not None
            assert list(one.finding.rows) == named


def test_healthy_data_leave_no_file(tmp_path: Path) -> None:
    """A run without a bad sample writes no list."""
    assert not (folder_of(trained(rows(), tmp_path)) / BAD_SAMPLES_FILE).exists()


class Stream(IterableDataset[Sample]):
    def __init__(self, data: list[Sample]) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.data)


def test_a_stream_has_places_and_hashes(tmp_path: Path) -> None:
    """Where there are no rows, place in the epoch and hash are recorded; the hash finds the sample again."""
    data = rows(**BAD)
    guard = trained(DataLoader(Stream(data), batch_size=8), tmp_path, max_epochs=2)
    found = {one.hash: one for one in listed(guard)}
    hashes = {row: sample_hash(data[row]) for row in (7, 20, 33, 61)}
    assert set(hashes.values()) <= found.keys() <= {*hashes.values(), sample_hash(data[50])}
    for row, name in hashes.items():
        assert (found[name].row, found[name].batch, found[name].index) == (None, row // 8, row % 8)
        assert found[name].times == 2
    named = [one.finding for one in guard.interventions if one.finding is not None and one.batch_idx == 0]
    assert [one.evidence["hash"] for one in named] == [hashes[7]] * 2
    assert [(one.evidence["position"], one.evidence.get("times_met")) for one in named] == [(0.0, None), (0.0, 2.0)]


def test_a_sample_beside_a_smaller_batch_has_a_place_only(tmp_path: Path) -> None:
    """A sample that no other part of the batch belongs to has no hash, and is not taken for another such sample."""

    class Beside(LogTargets):
        def training_step(self, batch: Any, index: int) -> Tensor | None:
            return super().training_step(batch["large"], index)

    def beside(samples: list[Sample]) -> Any:
        return {"small": default_collate(samples[:4]), "large": default_collate(samples)}

    guard = trained(
        DataLoader(Stream(rows(x7=math.nan, x14=math.nan)), batch_size=8, collate_fn=beside), tmp_path, module=Beside()
    )
    assert [(one.hash, one.times, one.batch, one.index) for one in listed(guard)] == [("", 1, 0, 7), ("", 1, 1, 6)]
    for number, found in enumerate(guard.interventions):
        assert found.finding is not None
        assert origin_in_words(found.finding) == f"batch {number} of the epoch"


def by_size(samples: list[Sample]) -> Any:
    """What packs sequences: the largest first."""
    return default_collate(sorted(samples, key=lambda one: -float(one[1])))


def test_rows_under_a_collate_function_that_sorts(tmp_path: Path) -> None:
    """Where samples change their places in the batch, a row is named only if it is seen to be bad itself."""
    data = rows(x7=math.nan, x20=math.inf, y33=-1.0)
    found = listed(trained(DataLoader(data, batch_size=8, shuffle=True, collate_fn=by_size), tmp_path))
    assert {one.row for one in found} <= {7, 20, 33, None}
    hashes = {sample_hash(data[row]): row for row in (7, 20, 33)}
    assert all(one.hash in hashes for one in found)
    assert len(found) >= 2


def test_an_epoch_that_is_resumed(tmp_path: Path) -> None:
    """After a resume in mid-epoch Lightning counts on and the loader begins anew: rows are right, counts go on, and
    batch and step are those of the record."""
    data = rows(x7=math.nan)
    first = NaNGuard(dirpath=tmp_path / "first")
    trainer = trainer_for(tmp_path, first, max_steps=6, max_epochs=-1)
    trainer.fit(LogTargets(), DataLoader(data, batch_size=8))
    trainer.save_checkpoint(tmp_path / "middle.ckpt")
    again = NaNGuard(dirpath=tmp_path / "second")
    with pytest.warns(UserWarning, match="not\n? resumable|before the epoch ended"):
        trainer_for(tmp_path, again, max_steps=12, max_epochs=-1).fit(
            LogTargets(), DataLoader(data, batch_size=8), ckpt_path=tmp_path / "middle.ckpt"
        )
    (found,) = listed(again)
    assert (found.row, found.batch, found.position, found.index, found.times) == (7, 6, 0, 7, 2)
    (record,) = again.interventions
    assert (record.batch_idx, record.global_step) == (6, 7) == (found.batch, found.global_step)
    assert record.finding is not None
    assert record.finding.rows == (7,)


class Overflows(LightningModule):
    """Its weight is made so large in one batch that the largest samples overflow; nothing is wrong with those."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.at = at

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        if index == self.at:
            with torch.no_grad():
                self.weight.fill_(1e17)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return (self.weight * batch[0].abs().amax(1) ** 6).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-12)


def test_samples_are_not_blamed_for_the_weights(tmp_path: Path) -> None:
    """Samples that overflow under weights gone wrong, and do not under the last good ones, are not listed."""
    data = rows(400)
    large = [sum(float(x.abs().max()) > 2.5 for x, _ in data[start : start + 8]) for start in range(0, 400, 8)]
    at = next(index for index, count in enumerate(large) if index >= 20 and count == 1)
    # Where good samples are to be kept, samples are looked for before the state is suspected.
    options = {"snapshot_every_n_steps": 2, "remedies": [SkipStep(keep_good_samples=True), *default_remedies()]}
    guard = trained(DataLoader(data, batch_size=8), tmp_path, Overflows(at), guard=options)
    assert len(guard.interventions) > 0
    assert listed(guard) == []


class LogOfOutput(LogTargets):
    """Takes the logarithm of an output of its own, which the weights make negative for some samples."""

    def __init__(self) -> None:
        super().__init__()
        self.aside = nn.Linear(4, 1)

    def training_step(self, batch: Any, index: int) -> Tensor | None:
        x, y = batch
        return (self.net(x) - y.log()).square().mean() + (self.aside(x) + 0.5).log().mean()


@pytest.mark.parametrize("quarantine", [False, True])
def test_samples_that_only_the_weights_make_bad(quarantine: bool, tmp_path: Path) -> None:
    """They are good under other weights of the same size and are not listed; one that is bad under all is."""
    torch.manual_seed(3)
    guard = trained(rows(y9=-1.0), tmp_path, LogOfOutput(), guard={"quarantine": quarantine})
    assert any("skip" in found.remedies for found in guard.interventions)
    assert {one.row for one in listed(guard)} == {9}


def test_a_cause_common_to_all_samples_costs_few_passes(tmp_path: Path) -> None:
    """Where whole batches are bad, parts of the first few are run, and then of one now and then."""
    passes: list[int] = []

    class Whole(LogTargets):
        def training_step(self, batch: Any, index: int) -> Tensor | None:
            passes.append(index)
            loss = super().training_step(batch, index)
            return loss * math.nan if loss is not None and index % 2 else loss

    guard = trained(DataLoader(rows(1280), batch_size=64), tmp_path, Whole())
    assert len(guard.interventions) == 10
    assert listed(guard) == []
    parts = [passes.count(index) - passes.count(0) for index in range(1, 20, 2)]
    assert sum(parts) < 250, parts
    assert max(parts[4:7] + parts[8:]) <= 6, parts


def test_a_field_that_is_longer_than_the_batch(tmp_path: Path) -> None:
    """An index into a field of another length, such as the boxes of all images, names no row and harms nothing."""

    class Boxes(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(3, 1)

        def training_step(self, batch: Any, index: int) -> Any:
            images, boxes = batch
            return self.net(images).square().mean() + boxes.square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    def collated(items: Any) -> Any:
        return torch.stack([image for image, _ in items]), torch.cat([boxes for _, boxes in items])

    data = [(torch.randn(3), torch.randn(5, 4)) for _ in range(16)]
    data[9][1][4, 0] = math.nan
    guard = NaNGuard(dirpath=tmp_path)
    loader = torch.utils.data.DataLoader(data, batch_size=4, collate_fn=collated)  # type: ignore[arg-type]
    trainer_for(tmp_path, guard, max_epochs=2).fit(Boxes(), loader)
    assert [one.remedies for one in guard.interventions] == [("skip",)] * 2


class NormalisesBatches(LogTargets):
    """Takes the mean of each batch off in a hook of the transfer, which spreads one NaN over the batch."""

    def __init__(self, bad_batch: int = -9) -> None:
        super().__init__()
        self.bad_batch = bad_batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        divisor = 0.0 if self.trainer.fit_loop.batch_idx == self.bad_batch else 1.0
        return (x - x.mean(0)) / divisor * divisor, y


def test_only_the_row_that_holds_nan_is_bad_where_a_hook_spreads_it(tmp_path: Path) -> None:
    """With quarantine it alone is left out, and the other samples of its batch are trained on again."""
    guard = trained(rows(x7=math.nan), tmp_path, NormalisesBatches(), guard={"quarantine": True}, max_epochs=3)
    assert [one.row for one in listed(guard)] == [7]
    (found,) = guard.interventions
    assert found.finding is not None
    assert found.finding.rows == (7,)


def test_no_row_is_bad_where_a_hook_makes_the_nan(tmp_path: Path) -> None:
    """The rows of the data set are finite, so none is named or left out."""
    guard = trained(rows(), tmp_path, NormalisesBatches(2), guard={"quarantine": True}, max_epochs=3)
    assert listed(guard) == []
    assert len(guard.interventions) == 3
    for one in guard.interventions:
        assert one.finding is not None
        assert (one.finding.rows, one.finding.samples) == ((), ())
        assert "on_after_batch_transfer" in one.finding.suggestion


class Detects(LogTargets):
    """Gets a list of images, of another height each, and a list of targets."""

    def training_step(self, batch: Any, index: int) -> Tensor | None:
        images, targets = batch
        x = torch.stack([image.mean(0) for image in images])
        return super().training_step((x, torch.stack([target["y"] for target in targets])), index)


def in_lists(samples: list[Sample]) -> Any:
    images = [x.expand(int(y * 10) % 3 + 1, -1).clone() for x, y in samples]
    return images, [{"y": y} for _, y in samples]


def test_rows_of_a_list_of_images(tmp_path: Path) -> None:
    """The image is named by its place in the list, and by its row of the data set."""
    loader = DataLoader(rows(x13=math.nan), batch_size=8, collate_fn=in_lists)  # type: ignore[arg-type]
    guard = trained(loader, tmp_path, Detects(), max_epochs=2)
    for one in guard.interventions:
        assert one.finding is not None
        assert (one.finding.samples, one.finding.rows) == ((5,), (13,))
    assert [(one.row, one.times) for one in listed(guard)] == [(13, 2)]


class DrawsZeros(LogTargets):
    """Its noise is infinite where a random number is 0."""

    def training_step(self, batch: Any, index: int) -> Tensor | None:
        x, y = batch
        noise = -(torch.randint(0, 100, y.shape) / 100).log()
        return super().training_step((x, y + 0.01 * noise), index)


class DrawsEmptyMasks(LogTargets):
    """Its loss is a mean over a mask that is drawn at random, and may select nothing."""

    def training_step(self, batch: Any, index: int) -> Tensor | None:
        chosen = (torch.rand(len(batch[0])) < 0.9).float()
        error = (self.net(batch[0]).squeeze(-1) - batch[1].reshape(len(chosen), -1)[:, 0]).square()
        return (error * chosen).sum() / chosen.sum()


@pytest.mark.parametrize(
    ("module", "cause"), [(DrawsZeros(), "random_draw"), (DrawsEmptyMasks(), "no_valid_target")], ids=["noise", "mask"]
)
def test_a_fault_by_chance_names_no_row(module: Any, cause: str, tmp_path: Path) -> None:
    """With other random numbers the same samples are good, so that none is listed or left out. A mask that selects
    nothing is named as such, with what decides it."""
    module.net = nn.Linear(4, 1)  # type: ignore[assignment]
    loader = DataLoader(rows(), batch_size=1)  # type: ignore[arg-type]
    guard = trained(loader, tmp_path, module, guard={"quarantine": True}, max_epochs=3)
    assert {one.cause for one in guard.interventions} == {cause}
    told = guard.interventions[0].finding
    assert told is not None
    assert "random numbers of the step" in told.suggestion
    assert listed(guard) == []


class RootOfOutput(LogOfOutput):
    """Its weights make many samples of each batch bad."""

    passes = 0

    def training_step(self, batch: Any, index: int) -> Tensor | None:
        RootOfOutput.passes += 1
        return (self.aside(batch[0]) + 0.5).sqrt().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-9)


def test_searches_in_vain_are_bounded(tmp_path: Path) -> None:
    """Searches that find no sample take at most a fixed number of passes together, and one for each update."""
    torch.manual_seed(3)
    limits = replace(Thresholds().samples, most_runs_ahead=200)
    options = {"thresholds": replace(Thresholds(), samples=limits)}
    guard = trained(DataLoader(rows(3200), batch_size=32), tmp_path, RootOfOutput(), guard=options)
    skipped = len(guard.interventions)
    assert skipped > 80
    # Each skipped batch is run a few times as a whole, and the last search may go beyond the limit.
    assert RootOfOutput.passes < 200 + 100 + 256 + 5 * 32 + 20 * skipped


class Exponential(LogTargets):
    """A rate that is the exponential of a sum of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 1)
        nn.init.constant_(self.net.weight, 0.15)

    def training_step(self, batch: Any, index: int) -> Tensor | None:
        x, y = batch
        logits = self.net(x)
        return (logits.exp() - y * logits).mean()


def test_the_samples_that_make_a_finite_gradient_too_large(tmp_path: Path) -> None:
    """Those without which the gradient is a usual one are named, and not listed as bad samples: they may be good."""
    guard = trained(DataLoader(rows(96, x77=320.0, x78=330.0), batch_size=8), tmp_path, Exponential())
    (one,) = guard.interventions
    found = one.finding
    assert found is not None
    assert (one.fault, found.cause, found.rows) == ("gradient_overflow", "unnormalised_input", (77, 78))
    assert found.suggestion.startswith("without samples 5 and 6 of this batch the gradient norm would be ")
    assert 0 < found.evidence["norm_without"] < 10
    assert listed(guard) == []


def test_a_gradient_that_all_samples_make_too_large(tmp_path: Path) -> None:
    """No sample is named if the gradient stays too large without any few of them."""
    data = rows(96)
    for row in range(72, 80):
        data[row] = (data[row][0].abs() * 0 + torch.tensor([320.0, 0.0, 0.0, 0.0]), data[row][1])
    guard = trained(DataLoader(data, batch_size=8), tmp_path, Exponential())
    assert [one.fault for one in guard.interventions] == ["gradient_overflow"]
    assert all(one.finding is not None and not one.finding.samples for one in guard.interventions)


class Combined(LogTargets):
    """Takes a batch of each of two loaders."""

    def training_step(self, batch: Any, index: int) -> Tensor | None:
        losses = [super(Combined, self).training_step(one, index) for one in batch.values()]
        return torch.stack([loss for loss in losses if loss is not None]).sum()


def test_samples_of_several_loaders_cannot_be_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With ``quarantine=True`` a message says so, because samples of two loaders hardly ever come together again."""
    loaders = {name: DataLoader(data, batch_size=8) for name, data in (("a", rows(x7=math.nan)), ("b", rows(88)))}
    guard = NaNGuard(quarantine=True)
    with caplog.at_level(logging.WARNING, "lightning_nanguard"):
        trainer_for(tmp_path, guard, max_epochs=2).fit(Combined(), CombinedLoader(loaders, "max_size_cycle"))
    assert [one.remedies for one in guard.interventions] == [("skip",)] * 2
    (said,) = [one.message for one in caplog.records if "quarantine=True" in one.message]
    assert "bad samples cannot be left out" in said

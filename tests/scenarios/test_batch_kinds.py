"""A batch of any kind is treated as a tuple of the same tensors is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from torch.optim import Adam
from torch.utils.data import DataLoader

from lightning_nanguard import NaNGuard
from lightning_nanguard.diagnosis.bundle import read
from lightning_nanguard.trainer.offline.replay import replay_bundle
from tests.batches import KINDS, packed, tensors_of
from tests.helpers import batches, differences, mlp, trainer_for, with_nan

BAD = {2, 9, 10}


class Takes(LightningModule):
    """Takes its tensors out of a batch of any kind."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(norm=True)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # Lightning's own refuses frozen dataclasses

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = tensors_of(batch)
        if isinstance(x, PackedSequence):
            x = pad_packed_sequence(x, batch_first=True)[0].sum(1)
        elif x.is_nested:
            x = torch.stack([part.sum(0) for part in x.unbind()])
        elif x.layout != torch.strided:
            x = x.to_dense()
        return (self.net(x) - y).square().mean()

    def configure_optimizers(self) -> Adam:
        return Adam(self.parameters(), lr=0.01)


def run(kind: Callable[[Tensor, Tensor], Any], folder: Path) -> tuple[NaNGuard, dict[str, Any]]:
    torch.manual_seed(0)
    data = [with_nan(batch, 3) if index in BAD else batch for index, batch in enumerate(batches(count=24))]
    guard = NaNGuard(dirpath=folder, bundle_dir=folder / "incidents", snapshot_every_n_steps=4)
    loader = DataLoader(data, batch_size=None, collate_fn=lambda pair: kind(*pair))
    trainer = trainer_for(folder, guard)
    module = Takes()
    trainer.fit(module, loader)
    return guard, module.state_dict()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[NaNGuard, dict[str, Any]]:
    return run(KINDS["tuple"], tmp_path_factory.mktemp("tuple"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_any_kind(kind: str, reference: tuple[NaNGuard, dict[str, Any]], tmp_path: Path) -> None:
    """NaN samples are found and named, what is done is the same to the last bit, and the incident can be replayed."""
    guard, state = run(KINDS[kind], tmp_path)
    expected, left = reference
    assert [(one.batch_idx, one.cause, one.remedies) for one in guard.interventions] == [
        (one.batch_idx, one.cause, one.remedies) for one in expected.interventions
    ]
    assert [one.finding and one.finding.samples for one in guard.interventions] == [(3,)] * len(BAD)
    assert differences(state, left) == []
    bundle = read(next(path for path in sorted((tmp_path / "incidents").iterdir())))
    report = replay_bundle(bundle, Takes())
    assert report.bad
    assert report.finding is not None
    assert (report.finding.cause, report.finding.samples) == ("non_finite_input", (3,))


ODD: dict[str, Callable[[Tensor], Any]] = {
    "packed": lambda x: packed(x.unsqueeze(1).repeat(1, 8, 1)),
    "nested": lambda x: torch.nested.nested_tensor([row[None] for row in x], layout=torch.jagged),
    "sparse": lambda x: x.to_sparse(),
    "compressed": lambda x: x.to_sparse_csr(),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.parametrize("kind", ODD)
def test_a_batch_of_odd_tensors(kind: str, tmp_path: Path) -> None:
    """Packed sequences, nested and sparse tensors: the sample is named, and the incident can be replayed."""
    guard, state = run(lambda x, y: (ODD[kind](x), y), tmp_path)
    assert [(one.batch_idx, one.cause) for one in guard.interventions] == [(i, "non_finite_input") for i in sorted(BAD)]
    assert [one.finding and one.finding.samples for one in guard.interventions] == [(3,)] * len(BAD)
    assert all(bool(value.isfinite().all()) for value in state.values())
    assert replay_bundle(read(next((tmp_path / "incidents").iterdir())), Takes()).bad

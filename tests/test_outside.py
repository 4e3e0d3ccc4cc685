"""The command line before and after a run: `nanguard check`, and incidents kept and replayed elsewhere."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nanguard import Fault, NaNGuard
from lightning_nanguard.cli.check import first_rows, look_over
from lightning_nanguard.cli.main import main
from lightning_nanguard.diagnosis import bundle as bundles
from lightning_nanguard.diagnosis.bundle import Bundle, Bundles, put_into, read
from lightning_nanguard.diagnosis.gradients import check_gradients
from lightning_nanguard.state.attributes import attributes_kept
from lightning_nanguard.state.batch_history import MicroBatch
from lightning_nanguard.types import Comparison, Evidence
from tests.helpers import FaultAt, differences, seed_all, trainer_for

HERE = Path(__file__)
NAN = math.nan


class Numbers(LightningDataModule):
    """Vectors of six numbers and five classes that can be learned."""

    def __init__(self, scale: float = 1.0, bad: int = -1, count: int = 64) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(3)
        x = torch.randn(count, 6, generator=source)
        y = (x @ torch.randn(6, 5, generator=source)).argmax(1)
        x *= scale
        if bad >= 0:
            x[bad, 2] = NAN
        self.data = TensorDataset(x, y)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.data, batch_size=16, shuffle=True)


class Wrong(torch.autograd.Function):
    """Squares, with a derivative that lacks the factor of two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0]


class Right(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient * ctx.saved_tensors[0]


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Applied(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function.apply

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


MIDDLE: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "wrong": lambda: Applied(Wrong),
    "right": lambda: Applied(Right),
    "reversed": lambda: Applied(Reversed),
    "dropout": lambda: nn.Sequential(nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Tanh()),
    "softmax": nn.ReLU,
    "detached": nn.ReLU,
}


class Model(LightningModule):
    """A classifier whose middle can be chosen."""

    def __init__(self, middle: str = "relu", lr: float = 0.1, log: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.middle, self.lr, self.of_log = middle, lr, log
        self.net = nn.Sequential(nn.Linear(6, 16), MIDDLE[middle](), nn.Linear(16, 5))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch[:2]
        logits = self.net(x)
        if self.middle == "softmax":
            logits = logits.softmax(1)
        if self.middle == "detached":
            logits = logits + self.net(x).detach().square()
        loss = F.cross_entropy(logits, y)
        if self.of_log:
            loss = loss + 0 * torch.log(x[:, 0] + 50).mean()
        self.log("loss", loss, on_epoch=True, batch_size=len(x))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr)


def make_model(lr: float = 0.1) -> Model:
    return Model(lr=lr, log=True)


# ---------------------------------------------------------------------------------------------------- check


def config(folder: Path, text: str = "", model: str = "", data: str = "") -> Path:
    path = folder / "config.yaml"
    path.write_text(
        f"seed_everything: 1\n{text}"
        "trainer: {accelerator: cpu, max_epochs: 3, callbacks: [{class_path: lightning_nanguard.NaNGuard}]}\n"
        f"model: {{class_path: tests.test_outside.Model, init_args: {{{model}}}}}\n"
        f"data: {{class_path: tests.test_outside.Numbers, init_args: {{{data}}}}}\n"
    )
    return path


CHECKS: list[tuple[str, str, str, tuple[str, ...], int, str]] = [
    ("healthy", "", "", (), 0, "nothing found that is wrong"),
    ("healthy, all", "", "", ("--gradients", "--overfit"), 0, "learned by heart"),
    ("pixels", "", "scale: 150", (), 1, "unnormalised_input in field 0 of the batch: first loss "),
    ("bad sample", "", "bad: 37", (), 1, "sample 37 of the data set holds NaN or Inf in field 0, column 2"),
    ("softmax", "middle: softmax", "", (), 1, "double_softmax in training_step (softmax, test_outside.py:"),
    ("gradient", "middle: wrong", "", ("--gradients",), 1,
     "wrong_gradient in net.1 (backward of Wrong, test_outside.py:"),
    ("rate", "lr: 1.e-9", "", ("--overfit",), 0, "the model can learn them, with another optimizer or rate"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "data", "options", "status", "said"), [c[1:] for c in CHECKS], ids=[c[0] for c in CHECKS]
)
def test_check(
    model: str,
    data: str,
    options: tuple[str, ...],
    status: int,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`nanguard check` says what is wrong before a run, by its exit status too, and writes nothing."""
    monkeypatch.chdir(tmp_path)
    path = config(tmp_path, model=model, data=data)
    assert main(["check", "--config", str(path), *options]) == status
    assert said in capsys.readouterr().out
    assert [found.name for found in tmp_path.iterdir()] == ["config.yaml"]


def test_check_takes_the_classes_of_a_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A configuration that names no classes is completed on the command line, by module or by file."""
    path = tmp_path / "config.yaml"
    path.write_text("fit:\n  model: {middle: softmax}\n  data: {count: 32}\n  ckpt_path: null\n")
    named = ["--model", "tests.test_outside:Model", "--data", f"{HERE}:Numbers"]
    assert main(["check", "--config", str(path), *named]) == 1
    assert "double_softmax" in capsys.readouterr().out
    assert main(["check", "--config", str(path)]) == 2
    assert "names no class for the model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["check", "--config", "none.yaml"], "No such file"),
        (["check", "--config", "none.yaml", "--model", "Model"], "write package.file:Class"),
        (["check", "--config", "none.yaml", "--model", "none.py:Model"], "there is no file none.py"),
        (["replay", "none"], "none holds no incident: there is no bundle.json"),
    ],
)
def test_commands_say_what_they_lack(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A command that cannot be carried out says why in one line."""
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_missing_extras_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an optional package the error names the extra that brings it."""
    from importlib import import_module

    from lightning_nanguard.trainer.private import lightning_cli

    def without(*names: str) -> Callable[[str], Any]:
        def load(name: str) -> Any:
            if name in names:
                raise ModuleNotFoundError(name)
            return import_module(name)

        return load

    monkeypatch.setattr(bundles, "import_module", without("safetensors.torch"))
    monkeypatch.setattr(lightning_cli, "import_module", without("jsonargparse"))
    with pytest.raises(ModuleNotFoundError, match=r"lightning-nanguard\[bundle\]"):
        NaNGuard(bundle_dir=tmp_path)
    with pytest.raises(ModuleNotFoundError, match=r"lightning-nanguard\[cli\]"):
        lightning_cli.from_config(config(tmp_path))


@pytest.mark.parametrize("middle", list(MIDDLE))
def test_gradients_against_finite_differences(middle: str) -> None:
    """Right gradients agree to many digits, wrong ones do not; weights and random streams come back bit for bit."""
    seed_all()
    model = Model(middle)
    model.log = lambda *args, **kwargs: None  # type: ignore[method-assign, assignment]
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    batch = next(iter(Numbers().train_dataloader()))

    def around() -> Any:
        torch.manual_seed(4)
        return attributes_kept(model)

    checks = check_gradients(model, batch, lambda given: model.training_step(given, 0), around)
    wrong = {"wrong": True, "reversed": True, "detached": False}
    assert max(one.error for one in checks) > 0.05 if middle in wrong else all(one.error < 1e-5 for one in checks)
    assert [one.custom for one in checks if one.custom] == [True] * (middle in ("wrong", "right", "reversed"))
    if wrong.get(middle):
        (custom,) = (one for one in checks if one.custom)
        assert custom.error > 0.05
        assert custom.place.startswith("net.1 (backward of ")
        ratio = {"wrong": 2.0, "reversed": -1.0}[middle]
        assert custom.numeric == pytest.approx(ratio * custom.analytic, rel=1e-4)
    buffers = {name: tensor for name, tensor in model.named_buffers() if middle == "dropout"}
    after = {name: tensor for name, tensor in model.state_dict().items() if name not in buffers}
    assert differences({name: before[name] for name in after}, after) == []
    assert torch.get_default_dtype() == torch.float32


def test_what_cannot_be_doubled_is_told(tmp_path: Path) -> None:
    """A model that runs in single precision only is not checked, and that is said."""

    class Single(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0].float()), batch[1])

    said: list[Any] = []
    trainer = trainer_for(tmp_path, limit_val_batches=0)
    from lightning_nanguard.trainer.private.first_batch import at_first_batch

    at_first_batch(
        trainer,
        Single(),
        lambda t, m, batch, i: said.append(look_over(t, m, batch, gradients=True)),
        datamodule=Numbers(),
    )
    assert "could not be checked in float64" in said[0].notes[0]


# ---------------------------------------------------------------------------------------------------- incidents


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


BATCHES: list[Any] = [
    (torch.randn(3, 2), torch.arange(3)),
    {"image": torch.randn(2, 2).t(), 7: [torch.tensor(1.5), None, True, "word", 3], "far": math.inf},
    [torch.zeros(2, dtype=torch.bool), torch.ones(2, dtype=torch.bfloat16), (), {}, torch.zeros(0, 3)],
    torch.randn(4)[::2],
]


@pytest.mark.parametrize("batch", BATCHES, ids=["tuple", "dict", "list", "tensor"])
def test_batches_come_back_as_they_were(batch: Any, tmp_path: Path) -> None:
    """Nested batches survive the folder bit for bit, and nothing in it is a pickle."""
    evidence = Evidence(3, comparison=Comparison(NAN, 1.0), levels=(1.0, None), usual_norm=math.inf)
    written = Bundle(
        module="m:C",
        hparams={"a": 1, "b": nn.ReLU()},
        fault=Fault("non_finite_loss", "batch", "loss", NAN),
        evidence=evidence,
        finding=None,
        batches=[MicroBatch(3, 2, batch, (torch.get_rng_state(),))],
        state={"w": torch.randn(3)},
    )
    (tmp_path / "one").mkdir()
    bundles.write(written, tmp_path / "one")
    again = read(tmp_path / "one")
    assert differences(batch, again.batches[0].batch) == []
    assert differences(written.batches[0].random, again.batches[0].random) == []
    assert differences(dict(written.state), dict(again.state)) == []
    assert repr(again.evidence) == repr(evidence)
    assert repr(again.fault) == repr(written.fault)
    assert again.hparams == {"a": 1}
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["bundle.json", "tensors.safetensors"]
    json.loads((tmp_path / "one" / "bundle.json").read_text())


def test_what_cannot_be_kept_is_named(tmp_path: Path) -> None:
    """A part of the batch that JSON does not know is left out and named; the run goes on."""
    keeper = Bundles(tmp_path / "all", most=2, each=1)
    fault = Fault("non_finite_loss", "batch", "loss")
    odd = Bundle("m:C", {}, fault, Evidence(1), None, [MicroBatch(1, 0, (torch.zeros(2), object()), ())], {})
    path = keeper.keep(odd, 7)
    assert path is not None
    assert read(path).missing == ["batch/0/1 (builtins.object)"]
    assert not keeper.due(fault, None)
    assert keeper.due(Fault("gradient_spike", "batch", "gradient"), None)


def test_incidents_are_bounded_and_harmless(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Three incidents of a kind are kept, and a folder that cannot be written to costs the run nothing."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    for folder, kept in ((tmp_path / "all", 3), (blocked, 0)):
        guard = NaNGuard(bundle_dir=folder)
        trainer = trainer_for(tmp_path, guard, [FaultAt("input", NAN, range(3, 9))], max_epochs=3)
        trainer.fit(Model(), Numbers())
        assert len(guard.interventions) == 6
        assert len([*folder.glob("step_*")]) == kept
    assert "could not be kept" in caplog.text


def incident(folder: Path, fault: tuple[float, int] | None, **options: Any) -> tuple[NaNGuard, Path]:
    """A run with a value put into the input of a batch, and the folder of its first incident."""
    seed_all()
    guard = NaNGuard(bundle_dir=folder / "incidents", dirpath=folder)
    callbacks = [] if fault is None else [FaultAt("input", *fault)]
    trainer = trainer_for(folder, guard, callbacks, max_epochs=10, limit_val_batches=0)
    trainer.fit(Model(**options), Numbers())
    return guard, sorted((folder / "incidents").iterdir())[0]


INCIDENTS: dict[str, tuple[dict[str, Any], tuple[float, int] | None, str]] = {
    "log": ({"log": True}, (-60.0, 14), "log_of_zero"),
    "nan": ({"middle": "dropout"}, (NAN, 9), "non_finite_input"),
    "rate": ({"lr": 3000.0}, None, "learning_rate_too_high"),
}


@pytest.mark.parametrize("kind", list(INCIDENTS))
def test_an_incident_is_reproduced(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The batch of an incident is run again, and the cause is the one that the run found."""
    options, fault, cause = INCIDENTS[kind]
    guard, path = incident(tmp_path, fault, **options)
    assert guard.interventions[0].cause == cause
    assert main(["replay", str(path)]) == 0
    said = capsys.readouterr().out
    assert f"cause then: {cause}" in said
    assert f"\ncause: {cause}" in said
    # Layer by layer, in the order in which they ran.
    heading, *layers = said.split("\nlayer ")[1].splitlines()
    assert heading.split() == ["kind", "in", "out", "from", "to", "weight", "gradient", "saturated", "dead"]
    assert [line.split()[0] for line in layers][:1] == ["net.0"]


def test_an_incident_is_reproduced_elsewhere(tmp_path: Path) -> None:
    """A fresh process that knows nothing but the folder finds the same."""
    _, path = incident(tmp_path, INCIDENTS["log"][1], **INCIDENTS["log"][0])
    done = subprocess.run(
        [sys.executable, "-m", "lightning_nanguard.cli", "replay", str(path), "--module", "tests.test_outside:Model"],
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "\nreplayed: loss nan" in done.stdout
    assert "\ncause: log_of_zero in training_step (log, test_outside.py:" in done.stdout


def test_a_replay_draws_the_same_numbers(tmp_path: Path) -> None:
    """Dropout masks are those of the step: the loss is that of the run, to the last digit."""
    from lightning_nanguard.cli.check import replay_bundle

    seen: list[float] = []

    class Keeps(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            seen.append(float(loss.detach()))
            return loss

    seed_all()
    guard = NaNGuard(bundle_dir=tmp_path / "incidents", dirpath=tmp_path)
    trainer = trainer_for(tmp_path, guard, [FaultAt("gradient", NAN, 14)], max_epochs=5, limit_val_batches=0)
    trainer.fit(Keeps("dropout"), Numbers())
    bundle = read(next((tmp_path / "incidents").iterdir()))
    torch.manual_seed(99)
    (loss,) = replay_bundle(bundle, Model("dropout")).losses
    assert loss == seen[14]


def test_explain_tells_records_and_advice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`nanguard explain` prints every record of a run with its finding, and what the preflight said."""
    guard = NaNGuard(preflight=True, dirpath=tmp_path / "run" / "nanguard")
    trainer = trainer_for(tmp_path, guard, max_epochs=1, limit_val_batches=0)
    trainer.fit(Model("softmax"), Numbers(bad=37))
    assert main(["explain", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "step 0 (epoch 0), advice (preflight): non_finite_input in field 0 of the data set (sample 37)" in said
    assert "advice (preflight): double_softmax in training_step (softmax, test_outside.py:" in said
    assert "; skipped the batch; cause: non_finite_input in field 0 of the batch (sample " in said
    assert len(said.splitlines()) == 2 + 2 + 1


def test_a_replay_needs_the_same_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Arguments can be given; a module that the state does not fit is named with the first difference."""
    _, path = incident(tmp_path, (-60.0, 14), log=True)
    assert main(["replay", str(path), "--module", "tests.test_outside:make_model", "--args", "{}"]) == 0
    assert "log_of_zero" in capsys.readouterr().out
    # Without the logarithm nothing happens.
    assert main(["replay", str(path), "--module", "tests.test_outside:Model", "--args", '{"log": false}']) == 1
    with pytest.raises(ValueError, match=r"net.0.bias is \(16,\) there and missing here \(4 such\)"):
        put_into(nn.Linear(2, 2), read(path).state)


def test_first_rows() -> None:
    """A smaller batch of the same structure."""
    cut = first_rows({"x": torch.arange(9), "more": (torch.zeros(9, 2), "word"), "scale": torch.ones(3)}, 4)
    assert [len(cut["x"]), len(cut["more"][0]), cut["more"][1], len(cut["scale"])] == [4, 4, "word", 3]
    assert len(first_rows(Pair(torch.zeros(5), torch.zeros(5)), 2).b) == 2

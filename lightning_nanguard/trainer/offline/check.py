"""Checks the data and the untrained model of a configuration, for ``nanguard check``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from lightning_nanguard.diagnosis.batch import samples
from lightning_nanguard.diagnosis.case import Case, Model
from lightning_nanguard.diagnosis.gradients import check_gradients
from lightning_nanguard.diagnosis.module_state import put_into, state_of
from lightning_nanguard.diagnosis.preflight import Preflight
from lightning_nanguard.diagnosis.rules.loss_function import wrong_gradient
from lightning_nanguard.measure.batches import mapped
from lightning_nanguard.thresholds.check import CHECK, CheckThresholds
from lightning_nanguard.thresholds.diagnosis import DEFAULT
from lightning_nanguard.trainer.private.data_order import readable_loader
from lightning_nanguard.trainer.private.first_batch import at_first_batch
from lightning_nanguard.trainer.private.lightning_cli import from_config
from lightning_nanguard.trainer.private.training_step import BareStep, clip_as_configured
from lightning_nanguard.trainer.private.untraced import untraced
from lightning_nanguard.types import Finding


@final
@dataclass(frozen=True)
class CheckReport:
    """The result of a check.

    Attributes:
        findings: The findings, those with the highest confidence first.
        notes: Further measurements, one sentence each.
    """

    findings: Sequence[Finding] = ()
    notes: Sequence[str] = ()

    @property
    def sure(self) -> bool:
        """Whether a finding has enough confidence to be reported as a problem."""
        return any(finding.confidence > DEFAULT.confidence.told for finding in self.findings)


def check_config(config: Path, model: Any, data: Any, *, gradients: bool, overfit: bool) -> CheckReport:
    """Check the data and the untrained model of a LightningCLI configuration. It writes nothing.

    Args:
        config: The YAML file.
        model: Class of the module; ``None`` if the file names one.
        data: Class of the data module; ``None`` if the file names one.
        gradients: Whether to compare gradients with finite differences, too.
        overfit: Whether to test, too, if the model can overfit a few samples.
    """
    trainer, module, datamodule = from_config(config, model, data)
    found: list[CheckReport] = []

    def on_batch(trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        found.append(check_batch(trainer, module, batch, gradients=gradients, overfit=overfit))

    at_first_batch(trainer, module, on_batch, **({} if datamodule is None else {"datamodule": datamodule}))
    return found[0] if found else CheckReport(notes=("there was no batch to check",))


def check_batch(
    trainer: Any,
    module: Any,
    batch: Any,
    *,
    gradients: bool = False,
    overfit: bool = False,
    thresholds: CheckThresholds = CHECK,
) -> CheckReport:
    """Check a module with its first batch.

    Args:
        trainer: The trainer, before its first step.
        module: Its module; ``overfit`` trains it.
        batch: The first batch.
        gradients: Whether to compare gradients with finite differences, too.
        overfit: Whether to test, too, if the model can overfit a few samples.
        thresholds: How many samples, and when they count as learned.
    """
    automatic = bool(module.automatic_optimization)
    step = partial(BareStep(trainer).loss_with_graph, batch_idx=0)
    around = partial(untraced, trainer, module)
    found = Preflight(module, step, around).findings(batch, readable_loader(trainer, module), run=automatic)
    notes: list[str] = []
    if not automatic:
        notes.append("manual optimization: only the data were checked")
    elif gradients or overfit:
        few = first_rows(batch, thresholds.samples)
        if gradients:
            more, note = _check_gradients(module, few, partial(step, full_precision=True), around)
            found, notes = (*found, *more), [*notes, note]
        if overfit:
            notes.append(_overfit(trainer, module, few, thresholds))
    return CheckReport(tuple(sorted(found, key=lambda one: -one.confidence)), notes)


def _check_gradients(
    module: nn.Module, batch: Any, step: Callable[[Any], Tensor | None], around: Callable[[], Any]
) -> tuple[Sequence[Finding], str]:
    try:
        checks = check_gradients(module, batch, step, around)
    except Exception as error:
        return (), f"gradients: could not be checked in float64: {type(error).__name__}: {error}"
    wrong = wrong_gradient(Case(model=Model(updates=1, checks=checks)))
    custom = sum(one.custom for one in checks)
    largest = max((one.error for one in checks), default=0.0)
    return () if wrong is None else (wrong,), (
        f"gradients: checked {len(checks) - custom} parameters and {custom} custom functions; the largest relative "
        f"difference from finite differences is {largest:.2g}"
    )


def first_rows(batch: Any, count: int) -> Any:
    """The first samples of a batch. Fields that do not have the length of the batch do not change."""
    size = samples(batch)
    return mapped(batch, lambda tensor: tensor[:count] if tensor.dim() and len(tensor) == size else tensor)


def _overfit(trainer: Any, module: nn.Module, batch: Any, thresholds: CheckThresholds) -> str:
    """Train on one small batch, with the configured optimizer and then with Adam; return the result in one line.

    Args:
        trainer: The trainer, at its first batch.
        module: Its module; it is left trained.
        batch: The samples.
        thresholds: Number of updates, and when the samples count as learned.
    """
    before = {name: tensor.clone() for name, tensor in state_of(module).items()}
    said = []
    for name, optimizer in _optimizers(trainer, module, thresholds):
        put_into(module, before)
        losses = _train(trainer, optimizer, batch, thresholds)
        if len(losses) < 2:
            return "overfit: training_step returned no loss"
        first, last = losses[0], losses[-1]
        said.append(f"{first:.4g} → {last:.4g} in {len(losses) - 1} updates ({name})")
        if last < thresholds.learned_share * first:
            verdict = "learned by heart"
            if len(said) > 1:
                verdict = "the model can learn them, with another optimizer or rate than configured"
            break
        verdict = "not learned by heart: look at the loss, the labels, and for tensors that are detached"
        if last < thresholds.stuck_share * first:
            verdict = "partly learned"
    return f"overfit: {samples(batch) or 0} samples, loss {'; '.join(said)}: {verdict}"


def _optimizers(trainer: Any, module: nn.Module, thresholds: CheckThresholds) -> list[tuple[str, Optimizer]]:
    own = trainer.optimizers[0]
    rate = float(own.param_groups[0]["lr"])
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    others = [(f"Adam at {lr:g}", Adam(trained, lr)) for lr in thresholds.adam_rates]
    return [(f"{type(own).__name__} at {rate:.3g}, as configured", own), *others]


def _train(trainer: Any, optimizer: Optimizer, batch: Any, thresholds: CheckThresholds) -> list[float]:
    losses: list[float] = []
    step = BareStep(trainer)
    for _ in range(thresholds.overfit_updates + 1):
        loss = step.forward_backward(optimizer, batch, 0)
        if loss is None or not math.isfinite(loss):
            break
        losses.append(loss)
        if loss < thresholds.enough_share * losses[0]:
            break
        clip_as_configured(trainer, optimizer)
        optimizer.step()
    return losses

"""Puts the fault of a draw into a run. It knows nothing of a guard."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.transient.running import Strike, StrikeState

from .draws import IN_STATE, Draw


def _with_bit_flipped(value: Tensor, seed: int) -> None:
    # One of the highest bits below the sign: a lower one changes less than rounding does.
    width = 8 * value.element_size()
    bit = width - 2 - random.Random(seed).randrange(10)
    value.view({16: torch.int16, 32: torch.int32, 64: torch.int64}[width]).bitwise_xor_(1 << bit)


VALUES: dict[str, Callable[[Tensor], Any]] = {
    "NaN": lambda value: value.fill_(math.nan),
    "Inf": lambda value: value.fill_(math.inf),
    "-Inf": lambda value: value.fill_(-math.inf),
    # Infinite where the number format ends below it.
    "1e30": lambda value: value.copy_(torch.full_like(value, 1e30, dtype=torch.float64)),
    "subnormal": lambda value: value.fill_(1e-40),
    "bit": lambda value: _with_bit_flipped(value, 0),
    "sign": lambda value: value.neg_(),
    "× 300": lambda value: value.mul_(300),
}


class Injector(Strike):
    """Strikes when it is due: a batch's fault whenever that batch is run, if it lasts, every other fault once.

    Args:
        one: The draw; ``None`` never strikes.
    """

    values: Mapping[str, Callable[[Tensor], Any]] = VALUES

    def __init__(self, one: Draw | None) -> None:
        super().__init__(one)
        self.draw = one
        self.before = 0
        self._parts: set[int] = set()
        if one is not None:
            self.values = {**VALUES, "bit": lambda value: _with_bit_flipped(value, one.seed)}

    def due_in(self, kind: str, batch: int, part: int = 0) -> bool:
        """Whether a part of a batch is struck now; it has been struck then."""
        one = self.draw
        if one is None or (kind, batch) != (one.kind, one.at) or one.moment in ("validation", "save"):
            return False
        if part in self._parts and not one.lasting:
            return False
        self._parts.add(part)
        self.hits += 1
        return True

    def due_now(self, moment: str) -> bool:
        """Whether something is struck during a validation or a save; it has been struck then."""
        if self.draw is None or self.hits or self.draw.moment != moment or self.batch < self.draw.at // 2:
            return False
        self.hits += 1
        return True

    def due(self, kind: str) -> bool:
        """Whether state is struck before this batch; it has been struck then."""
        one = self.draw
        return one is not None and one.moment not in ("validation", "save") and super().due(kind)

    def spoil_whole(self, tensor: Tensor) -> Tensor:
        """Spoil every element of a tensor, in place."""
        assert self.draw is not None
        with torch.no_grad():
            self.values[self.draw.value](tensor)
        return tensor

    def spoil_number(self, number: float) -> float:
        """A number, spoilt."""
        return float(self.spoil_whole(torch.tensor([number], dtype=torch.float64)))

    def error(self) -> Exception:
        """The exception of the draw."""
        assert self.draw is not None
        return {"RuntimeError": RuntimeError, "OSError": OSError}[self.draw.value]("struck")


class InjectAround(StrikeState):
    """Spoils state before a batch, in a validation, or while a checkpoint is saved.

    Args:
        injector: When, and how.
        averages: Callbacks that keep averages.
    """

    def __init__(self, injector: Injector, averages: list[Any]) -> None:
        super().__init__(injector)
        self.injector, self.averages = injector, averages
        self._rates: list[Any] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        injector, one = self.injector, self.injector.draw
        for group, rate, struck in self._rates:
            # A rate that nobody has set since is that of the batches after it, too.
            if group["lr"] is struck:
                group["lr"] = rate
        self._rates.clear()
        injector.batch += 1
        if one is None:
            return
        if one.moment == "after" and injector.batch == one.at - 1 and not injector.before:
            injector.before += 1
            next(module.net.parameters()).data.view(-1)[0] = math.nan
        if one.kind in IN_STATE and injector.due(one.kind):
            self._state(trainer, module, one)
        if injector.due("rate"):
            for optimizer in trainer.optimizers[:1]:
                group = optimizer.param_groups[0]
                struck = injector.spoil_number(float(group["lr"]))
                self._rates.append((group, group["lr"], struck))
                group["lr"] = struck

    def on_validation_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
        one = self.injector.draw
        if (
            not trainer.sanity_checking
            and one is not None
            and one.kind in IN_STATE
            and self.injector.due_now("validation")
        ):
            self._state(trainer, module, one)

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        one = self.injector.draw
        if one is None or not self.injector.due_now("save"):
            return
        if one.kind == "exception":
            raise self.injector.error()
        self._state(trainer, module, one)

    def _state(self, trainer: Any, module: Any, one: Draw) -> None:
        tensors = self._tensors(trainer, module, one.kind)
        if tensors:
            self.injector.spoil(random.Random(one.seed + 1).choice(tensors))
        else:
            self.injector.hits -= 1

    def _tensors(self, trainer: Any, module: Any, kind: str) -> list[Tensor]:
        match kind:
            case "weight":
                return [parameter.data for parameter in module.net.parameters()]
            case "buffer":
                return [buffer for buffer in module.net.buffers() if buffer.is_floating_point()]
            case "moment":
                states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
                return [one for state in states for one in state.values() if isinstance(one, Tensor)]
            case "scaler":
                scale = trainer.precision_plugin.scaler._scale
                return [] if scale is None else [scale]
        models = [one._average_model for one in self.averages if one._average_model is not None]
        return [parameter.data for model in models for parameter in model.parameters()]


def strike_gradients(net: nn.Module, injector: Injector, number: Callable[[], int]) -> None:
    """Let the gradients of a net be struck, one or all of them.

    Args:
        net: The net.
        injector: When, and how.
        number: Gives the number of the batch that is run.
    """
    one = injector.draw
    if one is None or one.kind not in ("gradient", "gradients"):
        return
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    if one.kind == "gradient":
        parameters = [random.Random(one.seed + 2).choice(parameters)]
    for part, parameter in enumerate(parameters):
        parameter.register_hook(partial(_spoilt, injector, number, part))


def _spoilt(injector: Injector, number: Callable[[], int], part: int, gradient: Tensor) -> Tensor | None:
    assert injector.draw is not None
    kind = injector.draw.kind
    if not injector.due_in(kind, number(), part):
        return None
    return (injector.spoil if kind == "gradient" else injector.spoil_whole)(gradient.clone())

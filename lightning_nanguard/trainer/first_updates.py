"""Observes the first updates of a fit, to find mistakes that cause no NaN."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_nanguard.diagnosis.first_batches import FirstBatches
from lightning_nanguard.diagnosis.initialisation import looks_untrained
from lightning_nanguard.diagnosis.mistakes.observation import ModeSeen, Observation, ParameterSeen, RateSeen, prefixes
from lightning_nanguard.diagnosis.module_calls import ModuleCalls
from lightning_nanguard.guard.context import GuardContext
from lightning_nanguard.thresholds.mistakes import MistakeThresholds
from lightning_nanguard.trainer.private.callbacks import unfreezes
from lightning_nanguard.trainer.private.clock import expected_updates
from lightning_nanguard.trainer.private.packages import LightningModule, Trainer
from lightning_nanguard.trainer.private.training_step import compiled_by_lightning

_MODES = (_BatchNorm, _DropoutNd, nn.RNNBase, nn.MultiheadAttention)
_COMPILED = frozenset({"OptimizedModule", "ScriptModule", "RecursiveScriptModule"})


@final
class FirstUpdates:
    """Observes the first updates of a fit. It changes nothing, and reads little from the device.

    Args:
        trainer: The trainer.
        module: Its module.
        context: The objects that the parts of the guard share.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, context: GuardContext) -> None:
        self._trainer = trainer
        self._module = module
        self._context = context
        limits = self._limits = context.thresholds.diagnosis.mistakes
        optimizers = context.learner.optimizers
        self._named: Mapping[str, nn.Parameter] = {}
        self._unoptimized: set[str] = set()
        self._modes: Mapping[str, nn.Module] = {}
        # Not known to be correct yet: parameters that got no gradient, and modules in evaluation mode.
        self._waiting = self._named
        self._idle: Mapping[str, nn.Module] = self._modes
        self._trainable: set[str] = set()  # those of them that require a gradient
        self._evaluating = True
        self._calls: ModuleCalls | None = None
        self._batches = FirstBatches(limits)
        self._rates = [[_GroupRates() for _ in optimizer.param_groups] for optimizer in optimizers]
        self._gradients = [_AddedGradients(optimizer, limits.looks_at_gradients) for optimizer in optimizers]
        self._losses = self._updates = 0
        self._graph = False
        last = limits.updates - max(1, len(optimizers))  # the last batch makes one update for each optimizer
        rates_change = range(0, last, limits.updates_between_rates) if trainer.lr_scheduler_configs else ()
        # Updates in which rates and modes will be checked, without the present one.
        self._due = sorted({limits.least_updates, last, *rates_change} - {0})
        self._closely = True
        # Number of updates before this fit; ``None`` before its first one.
        self._begun: int | None = None
        # Number of updates after which to decide again what is checked.
        self._next_due: float = math.inf
        # Whether the present update is checked: the first ones, a few later ones, and all while parameters have no
        # gradient.
        self._looks = True
        # Whether the present batch is compared with others.
        self._compares = _draws(trainer, limits)

    # ---------------------------------------------------------------------------------------------- while it trains

    def see_batch(self, batch: Any, batch_idx: int) -> None:
        """A batch begins."""
        if self._compares:
            self._compares = self._batches.see(batch, first=batch_idx == 0)
        if self._updates and self._waiting and self._calls is None:
            modules = dict(self._module.named_modules())
            self._calls = ModuleCalls(modules, self._limits.most_modules)
            if not any(map(_is_compiled, modules.values())):
                self._calls.begin(batch)

    def _begin(self) -> None:
        # Done in the first update, because an earlier hook may have replaced a layer.
        optimizers = self._context.learner.optimizers
        owned = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        self._named = self._waiting = dict(self._module.named_parameters())
        self._unoptimized = {name for name, p in self._named.items() if id(p) not in owned}
        self._modes = self._idle = {path: one for path, one in self._module.named_modules() if _has_modes(one)}
        self._begun = self._context.state.step
        self._next_due = self._begun + 1

    def see_loss(self, loss: Tensor) -> None:
        """A backward pass is about to begin."""
        if not self._looks:
            return
        if not self._graph:
            self._losses += 1
            self._graph = loss.grad_fn is not None
        for one in self._gradients:
            one.before_backward()

    def see_step(self, optimizer_index: int) -> None:
        """An optimizer is about to step."""
        if not self._looks:
            return
        if self._begun is None:
            self._begin()
        if self._waiting:
            self._note_gradients()
        self._gradients[optimizer_index].before_step()
        if self._closely:
            groups = self._context.learner.optimizers[optimizer_index].param_groups
            for rates, group in zip(self._rates[optimizer_index], groups, strict=False):
                rates.see(group.get("lr"))
            if optimizer_index == 0 and self._updates <= self._limits.least_updates:
                # Earlier checks do not count, because a mode may change after the first batches.
                self._evaluating, self._idle = True, self._modes
            self._evaluating &= not self._module.training
            self._idle = {path: one for path, one in self._idle.items() if not one.training}

    def end_batch(self) -> bool:
        """A batch is over.

        Returns:
            Whether the observation is complete.
        """
        if self._calls is not None:
            self._calls.end()
        if self._begun is None or self._context.state.step < self._next_due:
            return False
        self._updates = updates = self._context.state.step - self._begun
        due = self._due
        self._closely = bool(due) and due[0] <= updates
        while due and due[0] <= updates:
            due.pop(0)
        self._looks = (
            self._closely
            or bool(self._waiting)
            or (self._losses > 0 and not self._graph)
            or any(one.looks for one in self._gradients)
        )
        next_due = updates + 1 if self._looks else due[0] if due else self._limits.updates
        self._next_due = self._begun + next_due
        return updates >= self._limits.updates

    def close(self) -> None:
        """Stop recording calls of modules."""
        if self._calls is not None:
            self._calls.end()

    def _note_gradients(self) -> None:
        self._waiting = {name: p for name, p in self._waiting.items() if p.grad is None}
        self._trainable.update(name for name, p in self._waiting.items() if p.requires_grad)

    # ---------------------------------------------------------------------------------------------- what was seen

    def observation(self) -> Observation | None:
        """The observation; ``None`` if there were too few updates, or no mistake is possible."""
        self._updates = 0 if self._begun is None else self._context.state.step - self._begun
        if self._updates < self._limits.least_updates:
            return None
        if self._waiting:
            self._note_gradients()
        batches, distinct = self._batches.count()
        if batches == distinct and self._nothing_stands_out():
            return None
        modes = tuple(self._mode(path) for path in self._modes)
        return Observation(
            updates=self._updates,
            parameters=self._parameters(modes),
            modes=modes,
            evaluating=self._evaluating,
            rates=tuple(
                RateSeen(index, number, rates.highest, rates.last, rates.rose, self._group_moved(index, number, rates))
                for index, groups in enumerate(self._rates)
                for number, rates in enumerate(groups)
                if rates.known
            ),
            expected=expected_updates(self._trainer) if self._trainer.lr_scheduler_configs else math.inf,
            scheduled=bool(self._trainer.lr_scheduler_configs),
            losses=self._losses,
            graphless=0 if self._graph else self._losses,
            added=max((one.most for one in self._gradients), default=0),
            batches=batches,
            distinct=distinct,
            unfreezes=unfreezes(self._trainer),
        )

    def _nothing_stands_out(self) -> bool:
        """Whether further checks cannot find a mistake, as in most runs."""
        return (
            not self._waiting
            and not self._unoptimized
            and not self._idle
            and (self._graph or not self._losses)
            and not any(one.most for one in self._gradients)
            and all(one.last > self._limits.ended * one.highest for groups in self._rates for one in groups)
        )

    def _parameters(self, modes: Sequence[ModeSeen]) -> tuple[ParameterSeen, ...]:
        calls = self._calls
        with_gradient = self._named.keys() - self._waiting.keys()
        seen = {name: name.rpartition(".")[0] for name in self._named}
        ran, graph, cut = set[str](), set[str](), set[str]()
        if calls is not None and calls.ran():
            seen = {name: calls.seen_of(owner) for name, owner in seen.items()}
            ran = calls.ran()
            if self._waiting:
                graph = calls.with_graph()
                cut = calls.cut({seen[name] for name in with_gradient})
        evaluated = tuple(f"{one.within}." for one in modes if not one.training and one.within != one.path)
        graphless = self._losses and not self._graph
        compared = self._named.keys() if graphless else self._waiting.keys() | self._unoptimized
        suspects = [name for name in self._named if name in compared or name.startswith(evaluated)]
        start = self._start() if suspects else {}
        untrained = self._untrained(suspects, start)
        copies = self._copies([name for name in suspects if name in self._waiting], with_gradient, start)
        return tuple(
            ParameterSeen(
                name=name,
                trainable=name in with_gradient or name in self._trainable,
                optimized=name not in self._unoptimized,
                gradient=name in with_gradient,
                ran=seen[name] != "" and seen[name] in ran,
                graph=seen[name] in graph,
                cut=seen[name] != "" and seen[name] in cut and name in self._waiting,
                untrained=untrained if name in suspects else None,
                copy=name in copies,
                moved=self._moved(name, start) if name in compared and name in start else None,
            )
            for name in self._named
        )

    def _group_moved(self, index: int, number: int, rates: _GroupRates) -> bool | None:
        """Whether a parameter of a group has changed although its rate is zero; ``None`` if this is not known."""
        if rates.highest:
            return None
        groups = self._context.learner.optimizers[index].param_groups
        owned = {id(p) for group in groups[number : number + 1] for p in group["params"]}
        start = self._start()
        known = [name for name, p in self._named.items() if id(p) in owned and name in start]
        return any(self._moved(name, start) for name in known) if known else None

    def _moved(self, name: str, start: Mapping[str, Tensor]) -> bool:
        return not torch.equal(start[name], self._named[name].detach())

    def _start(self) -> Mapping[str, Tensor]:
        """Parameters before the first update, if a snapshot still holds them."""
        first = min(self._context.ring.all(), key=lambda one: one.step, default=None)
        if first is None or first.step > 0 or first.shared():
            return {}
        leaves = {path[1]: leaf for path, leaf in first.leaves.items() if path[0] == "parameter"}
        return {name: leaves[name].to(self._named[name].device) for name in leaves.keys() & self._named.keys()}

    def _untrained(self, names: Sequence[str], start: Mapping[str, Tensor]) -> bool | None:
        """Whether all parameters look untrained; ``None`` if it is not known."""
        found, most = [], self._limits.most_weights
        matrices, vectors = ([one for one in names if (self._named[one].dim() > 1) is wide] for wide in (True, False))
        for name in (*matrices[:most], *vectors[:most]):
            owner = self._module.get_submodule(name.rpartition(".")[0])
            found.append(looks_untrained(start.get(name, self._named[name]), owner, self._limits))
        known = [one for one in found if one is not None]
        return all(known) if known else None

    def _copies(self, names: Sequence[str], trained: set[str], start: Mapping[str, Tensor]) -> set[str]:
        """The parameters among ``names`` whose part had the same weights at the start as a trained part."""
        twins: dict[tuple[tuple[int, ...], str], list[str]] = {}
        for name in trained:
            twins.setdefault((tuple(self._named[name].shape), name.rpartition(".")[2]), []).append(name)
        parts: set[str] = set()
        for name in names:
            value = start.get(name)
            if value is None or bool((value == value.flatten()[:1]).all()):
                continue
            for twin in twins.get((tuple(value.shape), name.rpartition(".")[2]), ()):
                if twin in start and torch.equal(start[twin], value):
                    parts.add(_part_apart_from(name, twin))
        return {name for name in names if name.startswith(tuple(f"{part}." for part in parts))}

    def _mode(self, path: str) -> ModeSeen:
        one = self._modes[path]
        within = next((name for name in prefixes(path) if not self._module.get_submodule(name).training), path)
        return ModeSeen(path, type(one).__name__, _drops(one), path not in self._idle, within)


@final
class _GroupRates:
    """The scheduled rate of one group."""

    def __init__(self) -> None:
        self.highest, self.last, self.rose, self.known = 0.0, 0.0, False, False

    def see(self, rate: Any) -> None:
        if not isinstance(rate, (int, float)):
            return  # a tensor: reading it may wait for the device
        if not 0.0 <= rate < math.inf:
            return  # the guard replaces it by the last valid one
        # A schedule that rises again after a fall has not ended.
        self.rose |= self.known and self.last < rate and self.last < self.highest / 2
        self.highest, self.last, self.known = max(self.highest, float(rate)), float(rate), True


@final
class _AddedGradients:
    """Checks whether the gradients of one optimizer are added to the ones of its last step."""

    def __init__(self, optimizer: Optimizer, looks: int) -> None:
        self._optimizer = optimizer
        # Number of updates still to check; 0 once the gradients were cleared.
        self.looks = looks
        self._used: nn.Parameter | None = None
        self._version = 0
        # Whether the backward pass began with the gradients of the last step.
        self._kept = False
        # Number of updates in a row with added gradients, and the largest such number.
        self._in_a_row = self.most = 0

    def before_backward(self) -> None:
        """Check whether the gradients of the last step were cleared."""
        if self._used is None:
            return
        gradient = self._used.grad
        if gradient is None or gradient.layout != torch.strided or not bool(gradient.any()):
            self._used, self.looks = None, 0
        else:
            self._kept = True

    def before_step(self) -> None:
        """Check the gradients of this step; the optimizer is about to use them."""
        if not self.looks:
            return
        # A gradient that the user has set is a new tensor, to which nothing was added.
        gradient = None if self._used is None or not self._kept else self._used.grad
        self._in_a_row = self._in_a_row + 1 if gradient is not None and gradient._version > self._version else 0
        self.most = max(self.most, self._in_a_row)
        self.looks -= 1
        every = (p for group in self._optimizer.param_groups for p in group["params"])
        self._used, self._kept = next((p for p in every if p.grad is not None), None), False
        if self._used is not None and self._used.grad is not None:
            self._version = self._used.grad._version


def _draws(trainer: Trainer, limits: MistakeThresholds) -> bool:
    """Whether batches that repeat within an epoch are a mistake."""
    loader = trainer.train_dataloader
    # In a list of ready batches, or with overfit_batches, repeated batches are intended.
    draws = isinstance(loader, DataLoader) and loader.batch_size is not None
    whole = trainer.num_training_batches >= limits.batches
    return draws and whole and not getattr(trainer, "overfit_batches", False)


def _has_modes(module: nn.Module) -> bool:
    return isinstance(module, _MODES) and (isinstance(module, _BatchNorm) or _drops(module))


def _drops(module: nn.Module) -> bool:
    if isinstance(module, _DropoutNd):
        return module.p > 0
    if isinstance(module, nn.RNNBase):
        return module.dropout > 0 and module.num_layers > 1
    return isinstance(module, nn.MultiheadAttention) and module.dropout > 0


def _is_compiled(module: nn.Module) -> bool:
    # A hook would make torch compile the module again.
    whole = module._compiled_call_impl is not None or type(module).__name__ in _COMPILED
    return whole or compiled_by_lightning(module)


def _part_apart_from(name: str, other: str) -> str:
    """The part of a parameter, such as ``teacher``, if another part has a parameter of the same name."""
    words, others = name.split("."), other.split(".")
    while len(words) > 1 and others and words[-1] == others[-1]:
        words, others = words[:-1], others[:-1]
    return ".".join(words)

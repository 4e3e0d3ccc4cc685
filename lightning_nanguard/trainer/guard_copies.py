"""Copies and pickles a guard at any time: without the present run, and in plain containers."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_nanguard.act.defaults import default_remedies
from lightning_nanguard.act.reset_moments import ResetMoments
from lightning_nanguard.act.skip_step import SkipStep
from lightning_nanguard.act.stop_training import StopTraining
from lightning_nanguard.decide.budget import Budget
from lightning_nanguard.detect.defaults import default_detectors
from lightning_nanguard.measure.containers import parts_of
from lightning_nanguard.record.memory import Memory
from lightning_nanguard.thresholds import Thresholds
from lightning_nanguard.trainer.arguments import Arguments
from lightning_nanguard.trainer.fit import Fit
from lightning_nanguard.trainer.never_called import copied, hooks_called
from lightning_nanguard.trainer.private.data_order import DataOrder
from lightning_nanguard.trainer.private.packages import GuardCallback
from lightning_nanguard.types import Finding, Intervention

if TYPE_CHECKING:
    from typing_extensions import Self

_PATHS = ("dirpath", "bundle_dir")


def nothing() -> None:
    """Do nothing: the undo function of a guard without a fit."""


# Attributes of the present run, and their values in a guard without one.
NO_RUN: dict[str, Any] = {"_fit": None, "_order": None, "_gate": None, "_undo_gate": nothing, "_put_back": nothing}
# Lightning also sets the module's log methods on every callback.
_OF_A_RUN = frozenset({*NO_RUN, "_given", "log", "log_dict"})


class CopyableGuard(GuardCallback):
    """The part of :class:`~lightning_nanguard.NaNGuard` that copies and pickles it.

    Packages copy models with their callbacks, and save them with their constructor arguments.
    """

    _arguments: Arguments
    _given: Arguments | None
    """The arguments as the environment has switched them, ``None`` if it has switched the guard off."""
    _memory: Memory
    _fit: Fit | None
    _order: DataOrder | None
    """Knows where the batches of the present fit come from; it is there before the fit."""
    _undo_gate: Callable[[], None]
    _put_back: Callable[[], None]
    """Gives the guard the place among the callbacks that the user gave it."""
    _last_state: dict[str, Any]

    def __init__(self, arguments: Arguments) -> None:
        super().__init__()
        self._arguments = self._given = arguments
        self._memory = Memory(arguments.thresholds.records)
        self._last_state = {}
        vars(self).update(NO_RUN)

    @property
    def lr_multiplier(self) -> float:
        """The present factor on the scheduled learning rates."""
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """An independent guard without a fit. This guard also shows the records of the copy."""
        made = memo[id(self)] = object.__new__(type(self))
        # The arguments are shared: each fit copies detectors and remedies, and a sink must stay the user's own object.
        shared = {"_arguments": self._arguments, "_given": self._given, "_memory": self._memory.copy()}
        own = {name: value for name, value in self._without_run().items() if name not in shared}
        vars(made).update({**copy.deepcopy(own, memo), **shared, **NO_RUN})
        copied(made, self)
        return made

    def __copy__(self) -> Self:
        """The same as a deep copy."""
        return self.__deepcopy__({})

    def __reduce__(self) -> tuple[Any, ...]:
        """Reduce the guard to plain containers and classes of this package."""
        hooks_called(self)  # another process may use the loaded guard
        own = self._without_run()
        arguments, memory = _plain(own.pop("_arguments")), own.pop("_memory").state_dict()
        return type(self), (), {**own, "arguments": arguments, "memory": memory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The inverse of ``__reduce__``."""
        hooks_called(self)
        own = dict(state)
        self._arguments = self._given = _arguments(own.pop("arguments"))
        self._memory.load_state_dict(own.pop("memory"))
        vars(self).update(own)

    def _without_run(self) -> dict[str, Any]:
        state = self._fit.guard.state_dict() if self._fit is not None else self._last_state
        own = {name: value for name, value in vars(self).items() if name not in _OF_A_RUN}
        return {**own, "_last_state": copy.deepcopy(state), "_multiplier": self.lr_multiplier}


def _plain(arguments: Arguments) -> dict[str, Any]:
    given = {one.name: getattr(arguments, one.name) for one in fields(arguments)}
    return given | {name: None if given[name] is None else str(given[name]) for name in _PATHS}


def _arguments(given: dict[str, Any]) -> Arguments:
    return Arguments(**given | {name: None if given[name] is None else Path(given[name]) for name in _PATHS})


def allow_in_checkpoints(guard: type) -> None:
    """Allow ``torch.load(weights_only=True)`` to load guards with the package's own detectors, remedies and thresholds.

    Models are saved with their constructor arguments. Users have to allow their own classes themselves.
    """
    parts = [
        *default_detectors(),
        *default_remedies(),
        ResetMoments(),
        SkipStep(),
        StopTraining(),
        Thresholds(),
        Budget(),
    ]
    found = {deque, guard, Finding, Intervention}
    _add_classes(parts, found)
    torch.serialization.add_safe_globals(list(found))


def _add_classes(value: Any, found: set[Any]) -> None:
    if type(value).__module__.startswith("lightning_nanguard"):
        found.add(type(value))
    for _, part in parts_of(value) or ():
        _add_classes(part, found)

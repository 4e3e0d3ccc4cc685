"""The state of a guard: in checkpoints, from fit to fit, and in copies and pickles, which lack the present run."""

from __future__ import annotations

import copy
import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import fields, replace
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
from lightning_nanguard.trainer.arguments import FOLDERS, Arguments
from lightning_nanguard.trainer.before_fit import BeforeFit
from lightning_nanguard.trainer.fit import Fit
from lightning_nanguard.trainer.never_called import copied, hooks_called
from lightning_nanguard.trainer.private.packages import GuardCallback
from lightning_nanguard.types import Finding, Intervention

if TYPE_CHECKING:
    from typing_extensions import Self

_logger = logging.getLogger("lightning_nanguard")

STATE_SCHEMA = 1
"""Version of what :meth:`StatefulGuard.state_dict` gives; raised when an entry changes its meaning."""
# Attributes of the present run. Lightning also sets the module's log methods on every callback.
_OF_A_RUN = frozenset({"_fit", "_before", "_given", "log", "log_dict"})


class StatefulGuard(GuardCallback):
    """The part of :class:`~lightning_nanguard.NaNGuard` that keeps its state.

    Packages copy models with their callbacks, and save them with their constructor arguments.
    """

    def __init__(self, arguments: Arguments) -> None:
        super().__init__()
        self._arguments = arguments
        # The arguments as the environment has switched them, ``None`` if it has switched the guard off.
        self._given: Arguments | None = arguments
        self._memory = Memory(arguments.thresholds.records)
        self._before = BeforeFit()
        self._fit: Fit | None = None
        self._last_state: dict[str, Any] = {}
        # What a checkpoint held, and what the next fit takes of it: the id of its run, and the guard's state.
        self._loaded: Mapping[str, Any] = {}
        self._resumed: Mapping[str, Any] = {}
        self._multiplier = 1.0

    @property
    def run_id(self) -> str | None:
        """Id of the run, which is in its records and checkpoints; ``None`` before the first fit."""
        return self._memory.run.get("id")

    @property
    def lr_multiplier(self) -> float:
        """The present factor on the scheduled learning rates."""
        known: float = self._memory.run.get("lr_multiplier", self._multiplier)
        return self._fit.context.rate.ratio() if self._fit is not None else known

    @property
    def non_finite_rate(self) -> float | None:
        """Share of the updates of all ranks whose loss or gradient was not finite; ``None`` before the end of a fit."""
        return self._memory.run.get("non_finite_rate")

    @property
    def clip_val(self) -> float | None:
        """The clipping value that the guard has turned on, ``None`` if it has not."""
        return self._fit.context.clipper.value if self._fit is not None else None

    @property
    def state_key(self) -> str:
        """Name of the guard's state in checkpoints. A Trainer asks for it when it gets the guard."""
        # If the Trainer forks processes for its fit, the hooks are called only in these.
        hooks_called(self)
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """Multiplier, clipping, windows, budgets and counts, in plain containers."""
        if self._given is None:
            return dict(self._loaded)  # for a later run with the guard
        state = self._fit.guard.state_dict() if self._fit is not None else dict(self._last_state)
        if not state:
            return {}
        return {"schema": STATE_SCHEMA, "guard": state, "interventions": self._memory.total, "run": self.run_id}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Store the state until the fit starts, because optimizers do not exist yet."""
        self._loaded = state_dict
        self._resumed = {"run": state_dict.get("run")}
        schema = state_dict.get("schema", STATE_SCHEMA)
        if schema != STATE_SCHEMA:
            _logger.warning(
                "NaNGuard: the checkpoint holds the guard's state in version %s, and this lightning-nanguard reads "
                "version %s. The run goes on, but the learning-rate multiplier, clipping, budgets and windows start "
                "anew. To keep them, install the version that wrote the checkpoint.",
                schema,
                STATE_SCHEMA,
            )
            return
        self._resumed = state_dict
        self._before.know_samples(state_dict.get("guard", {}))
        self._memory.total = int(state_dict.get("interventions", 0))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """An independent guard without a fit. This guard also shows the records of the copy."""
        made = memo[id(self)] = object.__new__(type(self))
        # The arguments are shared: each fit copies detectors and remedies, and a sink must stay the user's own object.
        shared = {"_arguments": self._arguments, "_given": self._given, "_memory": self._memory.copy()}
        own = {name: value for name, value in self._without_run().items() if name not in shared}
        vars(made).update({**copy.deepcopy(own, memo), **shared, "_fit": None, "_before": BeforeFit()})
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
        # What the guard that was saved did not know has the default here.
        self._arguments = self._given = replace(self._arguments, **own.pop("arguments"))
        self._memory.load_state_dict(own.pop("memory"))
        vars(self).update(own)

    def _without_run(self) -> dict[str, Any]:
        state = self._fit.guard.state_dict() if self._fit is not None else self._last_state
        own = {name: value for name, value in vars(self).items() if name not in _OF_A_RUN}
        return {**own, "_last_state": copy.deepcopy(state), "_multiplier": self.lr_multiplier}


def _plain(arguments: Arguments) -> dict[str, Any]:
    given = {one.name: getattr(arguments, one.name) for one in fields(arguments)}
    return given | {name: None if given[name] is None else str(given[name]) for name in FOLDERS}


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

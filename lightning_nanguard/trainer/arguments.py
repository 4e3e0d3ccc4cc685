"""The arguments of NaNGuard, checked, and the environment variable that switches every guard of a process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

from lightning_nanguard.act.base import Remedy
from lightning_nanguard.act.defaults import executors
from lightning_nanguard.decide.budget import Budget
from lightning_nanguard.detect.base import Detector
from lightning_nanguard.diagnosis.bundle import safetensors
from lightning_nanguard.diagnosis.rule_set import Rule
from lightning_nanguard.errors import require
from lightning_nanguard.record.base import Sink
from lightning_nanguard.thresholds import Thresholds
from lightning_nanguard.trainer.private.packages import rank_zero_info
from lightning_nanguard.types import ActOn

_NAME = "NaNGuard"
_VARIABLE = "NANGUARD"  # of the environment: ``off`` for no guard, ``observe`` for guards that only observe
_CHOICES = {
    "act_on": ("certain", "evidence"),
    "snapshot_device": ("auto", "same", "cpu"),
    "readback": ("auto", "step", "deferred"),
    "resume": ("strict", "last-good"),
}


@final
@dataclass(frozen=True, slots=True)
class Arguments:
    """The arguments of :class:`~lightning_nanguard.NaNGuard`; see there.

    Raises:
        ValueError: If an argument is out of its range or contradicts another.
        TypeError: If a detector, remedy or budget has the wrong type.
        ModuleNotFoundError: If ``bundle_dir`` is given and safetensors is not installed.
    """

    detectors: Sequence[Detector]
    remedies: Sequence[Remedy]
    snapshot_every_n_steps: int | str
    snapshot_device: str
    max_snapshots: int
    max_snapshot_memory: float | None
    budget: Budget
    dirpath: Path | None
    readback: str
    observe: bool
    preflight: bool
    examine_after: int | None
    bundle_dir: Path | None
    last_good_every_n_steps: int | None
    resume: str
    act_on: ActOn = "certain"
    quarantine: bool = False
    sinks: Sequence[Sink] = ()
    rules: Sequence[Rule] = ()
    thresholds: Thresholds = field(default_factory=Thresholds)

    def __post_init__(self) -> None:
        _check_instances("detectors", self.detectors, Detector)
        _check_instances("remedies", self.remedies, Remedy)
        executors(self.remedies)
        if not isinstance(self.budget, Budget):
            got = type(self.budget).__name__
            raise TypeError(f"{_NAME}(budget={self.budget!r}): expected a Budget, but got {got}.")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            require(value in choices, _NAME, name, value, f"one of {choices}")
        require(isinstance(self.quarantine, bool), _NAME, "quarantine", self.quarantine, "True or False")
        self._check_numbers()
        if self.bundle_dir is not None:
            safetensors()

    def _check_numbers(self) -> None:
        every, limit, after = self.snapshot_every_n_steps, self.max_snapshot_memory, self.examine_after
        valid = every == "auto" or _is_count(every)
        require(valid, _NAME, "snapshot_every_n_steps", every, '"auto" or an integer of at least 1')
        require(_is_count(self.max_snapshots), _NAME, "max_snapshots", self.max_snapshots, "an integer of at least 1")
        is_size = isinstance(limit, (int, float)) and not isinstance(limit, bool) and limit > 0
        require(limit is None or is_size, _NAME, "max_snapshot_memory", limit, "a number of GiB above 0, or None")
        steps = self.last_good_every_n_steps
        valid = steps is None or _is_count(steps)
        require(valid, _NAME, "last_good_every_n_steps", steps, "an integer of at least 1, or None")
        valid = after is None or (_is_count(after) and after >= 16)
        require(valid, _NAME, "examine_after", after, "None or an integer of at least 16")


def switched(arguments: Arguments) -> Arguments | None:
    """A guard's arguments after the environment variable was applied; ``None`` if the guard is off.

    Raises:
        ValueError: If the environment variable has another value.
    """
    value = os.environ.get(_VARIABLE, "").strip().lower() or "on"
    choices = ("on", "observe", "off")
    if value not in choices:
        raise ValueError(f"{_VARIABLE}={value} in the environment: expected one of {', '.join(choices)}.")
    if value == "on":
        return arguments
    rank_zero_info(f"NaNGuard {'is off' if value == 'off' else 'only observes'}: {_VARIABLE}={value} is set.")
    return replace(arguments, observe=True) if value == "observe" else None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_instances(name: str, given: Any, kind: type[Any]) -> None:
    if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
        raise TypeError(f"{_NAME}({name}={given!r}): expected a list of {kind.__name__} instances.")
    for item in given:
        if not isinstance(item, kind):
            hint = f"; write {item.__name__}()" if isinstance(item, type) else ""
            raise TypeError(f"{_NAME}({name}=…): {item!r} is not an instance of {kind.__name__}{hint}.")

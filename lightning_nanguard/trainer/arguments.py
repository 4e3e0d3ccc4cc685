"""The arguments of NaNGuard, checked, and the environment variable that switches every guard of a process."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, final, get_args, get_origin, get_type_hints

from lightning_nanguard.act.base import Remedy
from lightning_nanguard.act.defaults import default_remedies, executors
from lightning_nanguard.decide.budget import Budget
from lightning_nanguard.detect.base import Detector
from lightning_nanguard.detect.defaults import default_detectors
from lightning_nanguard.diagnosis.bundle import safetensors
from lightning_nanguard.diagnosis.rule_set import Rule, check_rules
from lightning_nanguard.errors import require
from lightning_nanguard.record.base import CallableSink, Sink, as_sinks
from lightning_nanguard.thresholds import Thresholds
from lightning_nanguard.trainer.private.packages import rank_zero_info
from lightning_nanguard.types import ActOn

FOLDERS = ("dirpath", "bundle_dir")
"""Arguments that are folders. They may be strings."""
_NAME = "NaNGuard"
_VARIABLE = "NANGUARD"  # of the environment: ``off`` for no guard, ``observe`` for guards that only observe


@final
@dataclass(frozen=True, slots=True)
class Arguments:
    """The arguments of :class:`~lightning_nanguard.NaNGuard`, with the defaults in place of ``None``; see there.

    Raises:
        ValueError: If an argument is out of its range or contradicts another.
        TypeError: If a detector, remedy or budget has the wrong type.
        ModuleNotFoundError: If ``bundle_dir`` is given and safetensors is not installed.
    """

    detectors: Sequence[Detector]
    remedies: Sequence[Remedy]
    snapshot_every_n_steps: int | Literal["auto"]
    snapshot_device: Literal["auto", "same", "cpu"]
    max_snapshots: int
    max_snapshot_memory: float | None
    budget: Budget
    dirpath: Path | None
    readback: Literal["auto", "step", "deferred"]
    observe: bool
    preflight: bool
    examine_after: int | None
    bundle_dir: Path | None
    last_good_every_n_steps: int | None
    resume: Literal["strict", "last-good"]
    sinks: Sequence[Sink]
    rules: Sequence[Rule]
    thresholds: Thresholds
    act_on: ActOn
    quarantine: bool

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Arguments:
        """The arguments as a user gave them, by name; other names among them are ignored."""
        told, limits = given["on_intervention"], given["thresholds"]
        if told is not None and not callable(told):
            raise TypeError(f"{_NAME}(on_intervention={told!r}): expected a callable.")
        own = [] if told is None else [CallableSink(told, every_rank=True)]
        limits = Thresholds() if limits is None else limits
        if not isinstance(limits, Thresholds):
            raise TypeError(
                f"{_NAME}(thresholds={limits!r}): expected a Thresholds object, such as Thresholds(detection=…)."
            )
        made = {
            "thresholds": limits,
            "sinks": (*own, *as_sinks(given["sinks"])),
            "rules": check_rules(given["rules"]),
        }
        defaults = {
            "detectors": default_detectors(limits.detection),
            "remedies": default_remedies(limits.rate_search.cut),
            "budget": Budget(),
        }
        made |= {name: default for name, default in defaults.items() if given[name] is None}
        return cls(**{one.name: given[one.name] for one in fields(cls)} | made)

    def __post_init__(self) -> None:
        for name in FOLDERS:
            if (folder := getattr(self, name)) is not None:
                object.__setattr__(self, name, Path(folder))
        _check_instances("detectors", self.detectors, Detector)
        _check_instances("remedies", self.remedies, Remedy)
        executors(self.remedies)
        if not isinstance(self.budget, Budget):
            got = type(self.budget).__name__
            raise TypeError(f"{_NAME}(budget={self.budget!r}): expected a Budget, but got {got}.")
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal:
                value, choices = getattr(self, name), get_args(kind)
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

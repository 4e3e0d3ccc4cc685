"""What is kept of a run: interventions and advice, each with its finding, as plain containers where asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from lightning_nanguard.types.faults import Scope

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Verdict = Literal["gained", "cost", "no difference", "not measured"]
"""The result of an intervention on finite evidence, compared with the branch that it gave up."""

SCHEMA_VERSION = 1
"""Version of the JSON written by :meth:`Record.to_dict`; raised when a field changes its meaning."""

Row = int | str
"""A row of a data set: its index, or in words the key that the user's sampler draws."""

Kind = tuple[str, str | None, tuple[str, ...]]
"""Fault, cause and remedies: what the interventions of one kind have in common."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A cause that the diagnosis found, with its evidence.

    Attributes:
        cause: Identifier of the cause, such as ``"non_finite_input"``.
        confidence: From 0 to 1.
        evidence: The numbers that support it; if ``rows`` are not known, ``position`` and ``hash`` of the samples.
        place: Module, operation or tensor.
        samples: Indices in the batch of the samples concerned.
        suggestion: What the user should do.
        scope: What is at fault by this finding, as in :class:`Fault`; ``None`` if it does not say. The learning rate
            is not cut for a finding that blames the batch, unless the last good weights do better on it.
        rows: Rows of the data set that ``samples`` are, in the same order; empty if they are not known.
    """

    cause: str
    confidence: float
    evidence: Mapping[str, float | str] = field(default_factory=dict)
    place: str = ""
    samples: tuple[int, ...] = ()
    suggestion: str = ""
    scope: Scope | None = None
    rows: tuple[Row, ...] = ()


@dataclass(frozen=True, slots=True)
class Record:
    """A record that is stored as one line of JSON."""

    def to_dict(self) -> dict[str, Any]:
        """Plain containers that ``json.dumps(…, allow_nan=False)`` accepts: non-finite numbers become strings.

        Example:
            >>> Intervention(7, 0, 7, "non_finite_loss", "loss", ("skip",), 0.1, 0.1).to_dict()["remedies"]
            ['skip']
        """
        return {"schema": SCHEMA_VERSION, **plain(asdict(self))}


@dataclass(frozen=True, slots=True)
class Intervention(Record):
    """The record of one thing that the guard did to a run, or with ``observe=True`` would have done.

    Attributes:
        global_step: The trainer's ``global_step`` when the fault was found.
        epoch: The trainer's ``current_epoch``.
        batch_idx: Index of the batch in its epoch, ``-1`` outside a batch.
        fault: Kind of the fault.
        place: Where the fault was found.
        remedies: What was done, in order, as short words (``"skip"``, ``"restore"``, ``"scale"``, ``"clip"``, …).
        lr_before: Effective learning rate of the first group before.
        lr_after: Effective learning rate of the first group after.
        snapshot_step: ``global_step`` of the state that a rollback restored, ``None`` without a rollback.
        cause: Identifier of the cause found, ``None`` if none was.
        finding: The whole finding, ``None`` if there is none.
        message: The fault in one sentence.
        value: The number by which the fault was detected; NaN and Inf are kept.
        applied: ``False`` if ``observe=True`` kept the guard from acting.
        ranks: Ranks that saw the fault, if not all of them did; empty with one process.
        updates_lost: Number of updates that a rollback undid, the faulty one included; 0 if they were made again.
        restart_updates: Number of updates that a trial made from the restored state, if the run goes on from them;
            else 0.
        run: Id of the run; ``""`` in records of version 0.1.0. Two records of different runs may be equal.
    """

    global_step: int
    epoch: int
    batch_idx: int
    fault: str
    place: str
    remedies: tuple[str, ...]
    lr_before: float | None
    lr_after: float | None
    snapshot_step: int | None = None
    cause: str | None = None
    finding: Finding | None = None
    message: str = ""
    value: float | None = None
    applied: bool = True
    ranks: tuple[int, ...] = ()
    updates_lost: int = 0
    restart_updates: int = 0
    run: str = field(default="", compare=False)

    @property
    def kind(self) -> Kind:
        """Fault, cause and remedies. Most sinks tell only the first intervention of each kind in full."""
        return self.fault, self.cause, self.remedies

    @property
    def ends_run(self) -> bool:
        """Whether it ended the run; with ``observe=True`` none does."""
        return self.applied and "stop" in self.remedies

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Intervention:
        """The inverse of :meth:`to_dict`; keys of later versions are ignored.

        Raises:
            ValueError: If ``data`` lacks a field that every version has.
        """
        return from_plain(
            cls,
            data,
            "record of an intervention",
            remedies=tuple,
            ranks=lambda ranks: tuple(map(int, ranks)),
            lr_before=_number,
            lr_after=_number,
            value=_number,
            finding=lambda finding: None if finding is None else _finding(finding),
        )


SUSPICION = "a finite suspicion"
"""The occasion of advice about a finite loss or gradient that looks bad."""


@dataclass(frozen=True, slots=True)
class Advice(Record):
    """Something that the guard noticed and only reports. It changes nothing and is no intervention.

    Attributes:
        global_step: The trainer's ``global_step`` when it was noticed.
        epoch: The trainer's ``current_epoch``.
        occasion: When the guard noticed it: ``"preflight"``, ``"first updates"``, …
        finding: What it found.
        run: Id of the run; ``""`` in advice of version 0.1.0.
    """

    global_step: int
    epoch: int
    occasion: str
    finding: Finding
    run: str = field(default="", compare=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Advice:
        """The inverse of :meth:`to_dict`; keys of later versions are ignored.

        Raises:
            ValueError: If ``data`` lacks a field.
        """
        return from_plain(cls, data, "record of advice", finding=_finding)


def _finding(data: Mapping[str, Any]) -> Finding:
    return from_plain(Finding, data, "finding", confidence=_number, evidence=_numbers, samples=tuple, rows=tuple)


_Made = TypeVar("_Made", bound="DataclassInstance")
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def plain(value: Any) -> Any:
    """Plain containers that ``json.dumps(…, allow_nan=False)`` accepts: non-finite numbers become strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def from_plain(kind: type[_Made], data: Mapping[str, Any], what: str, **convert: Callable[[Any], Any]) -> _Made:
    """Make a dataclass of plain containers, with ``convert`` for single fields; keys of later versions are ignored.

    Raises:
        ValueError: If a field is missing or cannot be converted. The message says that ``data`` is not a ``what``.
    """
    try:
        names = [name for name in _names(kind) if name in data]
        return kind(**{name: convert[name](data[name]) if name in convert else data[name] for name in names})
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"not a {what}: {error}; its keys are {sorted(data)}") from error


@cache
def _names(kind: type[DataclassInstance]) -> tuple[str, ...]:
    return tuple(one.name for one in fields(kind))


def _number(value: Any) -> Any:
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _number(value) for key, value in values.items()}

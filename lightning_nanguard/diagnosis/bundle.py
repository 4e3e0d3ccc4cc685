"""Stores incidents, each in a folder, without pickle: the batch, the state before the step, random states and versions.

``tensors.safetensors`` holds every tensor by name. ``bundle.json`` holds the structure of the batch, the fault, its
evidence, the finding and the versions. A bundle holds data of the run, so it is written only if the user asks for it.
"""

from __future__ import annotations

import json
import logging
import math
import platform
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, final

import torch
from torch import Tensor

from lightning_nanguard.diagnosis.bundle_batch import NON_FINITE, put_together, take_apart
from lightning_nanguard.errors import optional_module
from lightning_nanguard.record.messages import describe_finding
from lightning_nanguard.state.batch_history import MicroBatch
from lightning_nanguard.thresholds.diagnosis import DEFAULT, BundleThresholds
from lightning_nanguard.types import Comparison, Evidence, Fault, Finding, Intervention, Trial

_SCHEMA = 3
_TENSORS, _REST = "tensors.safetensors", "bundle.json"

# Traits of the built-in faults, for the rules: bundles of schema 1 lack them. A recorded fault was confirmed.
_TRAITS_BEFORE: dict[str, dict[str, Any]] = {
    "non_finite_loss": {"clipping_helps": True},
    "non_finite_gradient": {"clipping_helps": True},
    "gradient_overflow": {"clipping_helps": True},
    "gradient_spike": {"certain": False, "clipping_helps": True},
    "loss_scale_collapse": {"proof": "none"},
    "exploding_loss": {"certain": False, "clipping_helps": True},
    "collapsed": {"certain": False},
    "unsteady_loss": {"certain": False, "proof": "none"},
    "stuck_loss": {"certain": False, "proof": "none"},
    "overshoot": {"certain": False, "proof": "none"},
    "implausible_state": {"rate_may_cause": True},
}
# Fields that had another name in schema 1.
_RENAMED = {"scale": "loss_unit"}


@dataclass(frozen=True)
class Bundle:
    """An incident: a faulty update, with everything that is needed to run it again.

    Attributes:
        module: Class of the module, ``"package.file:Class"``. It is shown to the user and never imported.
        hparams: Arguments that the module saved with ``save_hyperparameters``, if JSON has a type for them.
        fault: The fault.
        evidence: The evidence about the fault.
        finding: The cause that was found; ``None`` if none was.
        batches: The micro-batches of the update, each with its index and random state.
        state: Parameters and buffers before the step, by name.
        precision: The trainer's precision.
        loss_scale: Scale of the GradScaler; ``None`` without one.
        versions: Versions of Python and of packages that affect a replay.
        missing: Places of the batch that hold an object which neither JSON nor safetensors can store.
    """

    module: str
    hparams: Mapping[str, Any]
    fault: Fault
    evidence: Evidence
    finding: Finding | None
    batches: Sequence[MicroBatch]
    state: Mapping[str, Tensor]
    precision: str = "32-true"
    loss_scale: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    missing: Sequence[str] = ()


def safetensors() -> ModuleType:
    """The functions of safetensors for torch.

    Raises:
        ModuleNotFoundError: If safetensors is not installed. The message names the extra.
    """
    return optional_module("safetensors.torch", "Incident bundles need safetensors", "bundle")


def write(bundle: Bundle, folder: Path) -> None:
    """Write an incident into an existing folder."""
    tensors: dict[str, Tensor] = {f"state/{name}": value for name, value in bundle.state.items()}
    missing: list[str] = []
    micros = []
    for number, micro in enumerate(bundle.batches):
        structure = take_apart(micro.batch, f"batch/{number}", tensors, missing)
        for index, state in enumerate(micro.random):
            tensors[f"random/{number}/{index}"] = state
        micros.append({"index": micro.index, "update": micro.update, "structure": structure})
    # Copied, because safetensors accepts neither views nor shared memory.
    safetensors().save_file(
        {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()},
        folder / _TENSORS,
    )
    # The record of an intervention already converts a finding to plain containers.
    record = Intervention(0, 0, 0, bundle.fault.kind, bundle.fault.place, (), None, None, finding=bundle.finding)
    rest = {
        "schema": _SCHEMA,
        "module": bundle.module,
        "hparams": _jsonable(bundle.hparams),
        "fault": _spelled(asdict(bundle.fault)),
        "evidence": _spelled(asdict(bundle.evidence)),
        "record": record.to_dict(),
        "batches": micros,
        "precision": bundle.precision,
        "loss_scale": bundle.loss_scale,
        "versions": dict(bundle.versions) or versions(),
        "missing": missing,
    }
    (folder / _REST).write_text(json.dumps(rest, indent=2, allow_nan=False), encoding="utf-8")


def read(folder: Path, *, with_batch: bool = True) -> Bundle:
    """Read an incident, including one of an earlier version.

    It imports nothing: the program must already have imported the classes of the batch.

    Args:
        folder: The folder of the incident.
        with_batch: Whether to read the batch, too.

    Raises:
        FileNotFoundError: If the folder holds no incident.
        ValueError: If a later version wrote it, if it is damaged, or if a class of its batch is not imported.
    """
    for name in (_REST, _TENSORS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no incident: there is no {name} in it.")
    library = safetensors()
    try:
        rest = json.loads((folder / _REST).read_text(encoding="utf-8"))
        if rest["schema"] > _SCHEMA:
            raise ValueError(f"{folder} was written by a later version: update lightning-nanguard to read it.")
        return _bundle(rest, library.load_file(folder / _TENSORS), with_batch=with_batch)
    except (ValueError, OSError):
        raise
    except Exception as error:  # the file may hold anything
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder} is damaged, or was not written by lightning-nanguard ({reason}).") from error


def _bundle(rest: Mapping[str, Any], tensors: Mapping[str, Tensor], *, with_batch: bool) -> Bundle:
    micros = []
    for number, micro in enumerate(rest["batches"] if with_batch else ()):
        random = tuple(tensors[name] for name in sorted(tensors) if name.startswith(f"random/{number}/"))
        micros.append(MicroBatch(micro["update"], micro["index"], put_together(micro["structure"], tensors), random))
    return Bundle(
        module=rest["module"],
        hparams=rest["hparams"],
        fault=_fault(rest["fault"], rest["schema"]),
        evidence=_evidence(rest["evidence"]),
        finding=Intervention.from_dict(rest["record"]).finding,
        batches=micros,
        state={name.removeprefix("state/"): value for name, value in tensors.items() if name.startswith("state/")},
        precision=rest["precision"],
        loss_scale=rest["loss_scale"],
        versions=rest["versions"],
        missing=rest["missing"],
    )


def _fault(data: Mapping[str, Any], schema: int) -> Fault:
    before = _TRAITS_BEFORE.get(data["kind"], {}) if schema < 2 else {}
    return Fault(**before | _fields(Fault, data))


def _evidence(data: Mapping[str, Any]) -> Evidence:
    named = {_RENAMED.get(key, key): value for key, value in data.items()}
    comparison = named.pop("comparison", None)
    known = _fields(Evidence, named)
    trial = known.pop("trial", None)
    return Evidence(
        **known,
        comparison=None if comparison is None else Comparison(**_fields(Comparison, comparison)),
        trial=None if trial is None else Trial(**_fields(Trial, trial)),
    )


def _fields(of: type[Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """The stored fields of a class. Fields that only other versions know are left out."""
    names = {one.name for one in fields(of)}
    return {key: _number(value) for key, value in data.items() if key in names}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect a replay."""
    found = {"python": platform.python_version()}
    for name in ("torch", "pytorch-lightning", "lightning", "lightning-nanguard"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def describe(bundle: Bundle) -> str:
    """Describe an incident in words."""
    finding = bundle.finding
    known = "no cause found in the run" if finding is None else f"cause in the run: {describe_finding(finding)}"
    return f"{bundle.fault.kind} in {bundle.fault.place or bundle.module}: {bundle.fault.message or '-'}; {known}"


def name_of_class(kind: type) -> str:
    """The name of a class for ``nanguard replay --module``: ``package.file:Class``, ``file.py:Class`` in a script."""
    home, main = kind.__module__, sys.modules.get("__main__")
    if home == "__main__":
        spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
        if spec is not None:  # python -m package.file
            home = spec.name
        elif file is not None and file.endswith(".py"):
            path = Path(file).absolute()
            home = str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
    return f"{home}:{kind.__qualname__}"


def to_import(module: str) -> str:
    """The module of an incident as the user has to name it: no other process can import from a run's own ``__main__``.

    Example:
        >>> to_import("package.file:Class"), to_import("__main__:Class")
        ('package.file:Class', 'FILE.py:Class')
    """
    home, _, name = module.partition(":")
    return f"FILE.py:{name}" if home == "__main__" else module


def _jsonable(values: Mapping[str, Any]) -> dict[str, Any]:
    known = {}
    for key, value in values.items():
        try:
            known[str(key)] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError):
            continue
    return known


def _spelled(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {"number": str(value)}
    if isinstance(value, Mapping):
        return {key: _spelled(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_spelled(item) for item in value]
    return value


def _number(value: Any) -> Any:
    if isinstance(value, Mapping):
        return NON_FINITE[value["number"]]
    return tuple(_number(item) for item in value) if isinstance(value, list) else value


_logger = logging.getLogger("lightning_nanguard")


@final
class BundleStore:
    """Writes a bounded number of incidents, each into its own folder. An error while writing does not end the run.

    Args:
        folder: The folder that holds the folders of the incidents.
        thresholds: How many incidents are kept.

    Raises:
        ModuleNotFoundError: If safetensors is not installed.
    """

    def __init__(self, folder: Path, thresholds: BundleThresholds = DEFAULT.bundles) -> None:
        safetensors()
        self.folder = folder
        self._thresholds = thresholds
        self._kept: Counter[tuple[str, str]] = Counter()

    def due(self, fault: Fault, finding: Finding | None) -> bool:
        """Whether to keep another incident of this kind."""
        limits, same = self._thresholds, self._kept[_kind(fault, finding)]
        return same < limits.max_per_kind and self._kept.total() < limits.max_bundles

    def keep(self, bundle: Bundle, global_step: int) -> Path | None:
        """Write an incident; return its folder, or ``None`` if it could not be written."""
        self._kept[_kind(bundle.fault, bundle.finding)] += 1
        path = _unused(self.folder / f"step_{global_step:07d}_{bundle.fault.kind}")
        partial = path.with_name(f".{path.name}")  # renamed when it is complete
        try:
            partial.mkdir(parents=True)
            write(bundle, partial)
            partial.rename(path)
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)
            _logger.warning(
                "NaNGuard: the incident of step %d could not be saved in %s: %s: %s. Training goes on.",
                global_step,
                self.folder,
                type(error).__name__,
                error,
            )
            return None
        command = shlex.join(["nanguard", "replay", str(path), "--module", to_import(bundle.module)])
        _logger.warning(
            "NaNGuard: the batch and the state before the step are saved in %s. To run them again: %s", path, command
        )
        return path


def _kind(fault: Fault, finding: Finding | None) -> tuple[str, str]:
    return fault.kind, "" if finding is None else finding.cause


def _unused(path: Path) -> Path:
    number = 2
    unused = path
    while unused.exists():
        unused = path.with_name(f"{path.name}_{number}")
        number += 1
    return unused

"""An incident in a folder: the batch, the state before the step, the random state and the versions, without pickle.

``tensors.safetensors`` holds every tensor by name and ``bundle.json`` the rest: the structure of the batch, the fault,
what was known about it, what was found, and with which versions. It holds data of the run, so nothing is written unless
it is asked for.
"""

from __future__ import annotations

import json
import logging
import math
import platform
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import Any, final

import torch
from torch import Tensor, nn

from lightning_nanguard.record.messages import describe_finding
from lightning_nanguard.state.batch_history import MicroBatch
from lightning_nanguard.types import Comparison, Evidence, Fault, Finding, Intervention

_logger = logging.getLogger("lightning_nanguard")


_SCHEMA = 1


_TENSORS, _REST = "tensors.safetensors", "bundle.json"


_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True)
class Bundle:
    """An incident as it was read from its folder.

    Attributes:
        module: Class of the module, ``"package.file:Class"``.
        hparams: What the module saved of its arguments (``save_hyperparameters``), as far as JSON knows it.
        fault: What was found.
        evidence: What was known about it.
        finding: The cause found then, ``None`` where none was.
        batches: The micro-batches of the update, each with its index and random state.
        state: Parameters and buffers before the step, by name.
        precision: The trainer's.
        loss_scale: The GradScaler's scale, ``None`` without one.
        versions: Of Python and the packages that matter.
        missing: What of the batch is of a kind that JSON and safetensors do not know, by its place.
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
        ModuleNotFoundError: When it is not installed, with the name of the extra.
    """
    try:
        return import_module("safetensors.torch")
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "Incident bundles need safetensors, which is not installed: pip install 'lightning-nanguard[bundle]'."
        ) from None


@final
class Bundles:
    """Writes incidents into folders of their own, a bounded number of them. Whatever goes wrong ends no run.

    Args:
        folder: Where the folders go.
        most: How many are kept of one run.
        each: How many of one fault and cause.

    Raises:
        ModuleNotFoundError: When safetensors is not installed.
    """

    def __init__(self, folder: Path, *, most: int = 10, each: int = 3) -> None:
        safetensors()
        self.folder = folder
        self._most = most
        self._each = each
        self._kept: Counter[tuple[str, str]] = Counter()

    def due(self, fault: Fault, finding: Finding | None) -> bool:
        """Whether another incident of this kind is kept."""
        kind = fault.kind, "" if finding is None else finding.cause
        return self._kept[kind] < self._each and self._kept.total() < self._most

    def keep(self, bundle: Bundle, global_step: int) -> Path | None:
        """Write an incident; its folder, ``None`` where it could not be written."""
        self._kept[bundle.fault.kind, "" if bundle.finding is None else bundle.finding.cause] += 1
        path = _free(self.folder / f"step_{global_step:07d}_{bundle.fault.kind}")
        half = path.with_name(f".{path.name}")
        try:
            half.mkdir(parents=True)
            write(bundle, half)
            half.rename(path)
        except Exception as error:
            shutil.rmtree(half, ignore_errors=True)
            _logger.warning(
                "NaNGuard: the incident of step %d could not be kept in %s: %s: %s. Training goes on.",
                global_step,
                self.folder,
                type(error).__name__,
                error,
            )
            return None
        _logger.warning("NaNGuard: the batch and the state before the step are in %s: nanguard replay %s", path, path)
        return path


def _free(path: Path) -> Path:
    number = 2
    free = path
    while free.exists():
        free = path.with_name(f"{path.name}_{number}")
        number += 1
    return free


def write(bundle: Bundle, folder: Path) -> None:
    """Write an incident into a folder that exists."""
    tensors: dict[str, Tensor] = {f"state/{name}": value for name, value in bundle.state.items()}
    missing: list[str] = []
    micros = []
    for number, micro in enumerate(bundle.batches):
        structure = _taken_apart(micro.batch, f"batch/{number}", tensors, missing)
        for index, state in enumerate(micro.random):
            tensors[f"random/{number}/{index}"] = state
        micros.append({"index": micro.index, "update": micro.update, "structure": structure})
    # A copy each: safetensors takes neither views nor shared memory.
    safetensors().save_file(
        {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()},
        folder / _TENSORS,
    )
    # The record of an intervention already knows how to write a finding down.
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


def read(folder: Path) -> Bundle:
    """Read an incident.

    Raises:
        FileNotFoundError: When the folder holds none.
        ValueError: When it was written by a later version.
    """
    if not (folder / _REST).is_file():
        raise FileNotFoundError(f"{folder} holds no incident: there is no {_REST} in it.")
    rest = json.loads((folder / _REST).read_text(encoding="utf-8"))
    if rest["schema"] > _SCHEMA:
        raise ValueError(f"{folder} was written by a later version: update lightning-nanguard to read it.")
    tensors: dict[str, Tensor] = safetensors().load_file(folder / _TENSORS)
    comparison = rest["evidence"].pop("comparison", None)
    rest["evidence"].setdefault("loss_unit", rest["evidence"].get("scale", 1.0))  # its name in version 0.1.0
    evidence = {key: _number(value) for key, value in rest["evidence"].items() if key in _names(Evidence)}
    if comparison is not None:
        evidence["comparison"] = Comparison(**{key: _number(value) for key, value in comparison.items()})
    micros = []
    for number, micro in enumerate(rest["batches"]):
        random = tuple(tensors[name] for name in sorted(tensors) if name.startswith(f"random/{number}/"))
        micros.append(MicroBatch(micro["update"], micro["index"], _put_together(micro["structure"], tensors), random))
    return Bundle(
        module=rest["module"],
        hparams=rest["hparams"],
        fault=Fault(**{key: _number(value) for key, value in rest["fault"].items() if key in _names(Fault)}),
        evidence=Evidence(**evidence),
        finding=Intervention.from_dict(rest["record"]).finding,
        batches=micros,
        state={name.removeprefix("state/"): value for name, value in tensors.items() if name.startswith("state/")},
        precision=rest["precision"],
        loss_scale=rest["loss_scale"],
        versions=rest["versions"],
        missing=rest["missing"],
    )


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Every dense parameter and buffer of a module, also those that are not persistent."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    ready = {
        name: t for name, t in named.items() if not isinstance(t, (nn.UninitializedParameter, nn.UninitializedBuffer))
    }
    return {name: tensor.detach() for name, tensor in ready.items() if tensor.layout == torch.strided}


def put_into(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put a state into a module that was built with the same arguments.

    Raises:
        ValueError: When the module is another one.
    """
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    wrong = [name for name, value in state.items() if name not in own or own[name].shape != value.shape]
    if wrong:
        first = wrong[0]
        shape = tuple(own[first].shape) if first in own else "missing"
        raise ValueError(
            f"The state does not fit {type(module).__name__}: {first} is {tuple(state[first].shape)} there and {shape} "
            f"here ({len(wrong)} such). Give the module the arguments it was built with."
        )
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)


def versions() -> dict[str, str]:
    """Versions of Python and of what a replay depends on."""
    found = {"python": platform.python_version()}
    for name in ("torch", "pytorch-lightning", "lightning", "lightning-nanguard"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def describe(bundle: Bundle) -> str:
    """An incident in words."""
    known = "no cause was found" if bundle.finding is None else f"cause then: {describe_finding(bundle.finding)}"
    return f"{bundle.fault.kind} in {bundle.fault.place or bundle.module}: {bundle.fault.message or '-'}; {known}"


def _taken_apart(value: Any, name: str, tensors: dict[str, Tensor], missing: list[str]) -> Any:
    if isinstance(value, Tensor):
        if value.layout == torch.strided:
            tensors[name] = value
            return {"tensor": name}
    elif value is None or isinstance(value, (bool, int, str)):
        return {"value": value}
    elif isinstance(value, float):
        return {"value": value} if math.isfinite(value) else {"number": str(value)}
    elif isinstance(value, Mapping) and all(isinstance(key, (str, int)) for key in value):
        items = [[key, _taken_apart(item, f"{name}/{key}", tensors, missing)] for key, item in value.items()]
        return {"dict": items}
    elif isinstance(value, (list, tuple)):
        items = [_taken_apart(item, f"{name}/{index}", tensors, missing) for index, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    missing.append(f"{name} ({type(value).__module__}.{type(value).__qualname__})")
    return {"value": None}


def _put_together(structure: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    ((kind, content),) = structure.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "number":
        return _NON_FINITE[content]
    if kind == "dict":
        return {key: _put_together(item, tensors) for key, item in content}
    if kind in ("list", "tuple"):
        items = [_put_together(item, tensors) for item in content]
        return tuple(items) if kind == "tuple" else items
    return content


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
        return _NON_FINITE[value["number"]]
    return tuple(_number(item) for item in value) if isinstance(value, list) else value


def _names(of: type[Any]) -> set[str]:
    return {one.name for one in fields(of)}

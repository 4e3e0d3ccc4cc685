"""Checkpoints: which tensors of one are poisoned, the last good state in their place, and which files are good."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from lightning_nanguard.measure.finite import non_finite_indices
from lightning_nanguard.measure.tensors import local
from lightning_nanguard.state import learner as learners
from lightning_nanguard.state.learner import Learner

LAST_GOOD = "nanguard-last-good.ckpt"
"""Name of the file that the guard itself keeps."""


_PREFIX = "module."  # AveragedModel and DDP keep the module under this name


@final
@dataclass(frozen=True, slots=True)
class Inspection:
    """What is wrong with a checkpoint file.

    Attributes:
        path: The file.
        damage: Why it cannot be read, ``""`` where it can.
        tensors: Names of the tensors in it that are not finite and should be.
        global_step: The step it was written at, ``None`` where it does not say.
        whole_run: Whether it holds more than weights, so that a run can go on from it.
    """

    path: Path
    damage: str = ""
    tensors: tuple[str, ...] = ()
    global_step: int | None = None
    whole_run: bool = False

    def good(self) -> bool:
        """Whether a run may go on from it."""
        return self.whole_run and not self.damage and not self.tensors


def poisoned(
    checkpoint: Mapping[str, Any], weights: Mapping[str, Tensor], allowed: Mapping[learners.StateKey, Tensor]
) -> list[str]:
    """Names of the weights, buffers, moments and averaged copies in a checkpoint that hold NaN or Inf.

    Anything else in it (scores of callbacks, metrics) may well be infinite and is not looked at.

    Args:
        checkpoint: Lightning's or any other nesting of dictionaries and lists.
        weights: The module's parameters and buffers; what has the name and the shape of one counts as a weight.
        allowed: Where buffers are non-finite by design, from :func:`lightning_nanguard.snapshot.allowances`.

    Example:
        >>> weights = {"w": torch.ones(2)}
        >>> bad = {"w": torch.tensor([1.0, float("nan")])}
        >>> poisoned({"state_dict": bad, "callbacks": {"best": torch.tensor(1e999)}}, weights, {})
        ['state_dict: w']
    """
    found = [*_found(checkpoint, weights, ())]
    bad = []
    for index in non_finite_indices([local(tensor) for _, _, tensor in found]):
        where, name, tensor = found[index]
        mask = allowed.get(("buffer", name.removeprefix(_PREFIX)))
        if mask is not None and mask.shape == tensor.shape:
            wrong = ~torch.isfinite(tensor.detach()) & ~mask.to(tensor.device)
            if not bool(wrong.any()):
                continue
        bad.append(f"{'/'.join(where)}: {name}")
    return bad


def _found(
    value: Any, weights: Mapping[str, Tensor], where: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], str, Tensor]]:
    if isinstance(value, Mapping):
        if _is_optimizer(value):
            for parameter, entries in value["state"].items():
                for path, tensor in _tensors(entries, ()):
                    yield where, f"{'.'.join(path)} of parameter {parameter}", tensor
            return
        for key, item in value.items():
            if isinstance(item, Tensor):
                if _is_weight(key, item, weights):
                    yield where, key, item
            else:
                yield from _found(item, weights, (*where, str(key)))
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            if not isinstance(item, Tensor):
                yield from _found(item, weights, (*where, str(number)))


def _tensors(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, (*path, str(key)))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item, path)


def _is_optimizer(value: Mapping[Any, Any]) -> bool:
    return isinstance(value.get("state"), Mapping) and isinstance(value.get("param_groups"), list)


def _is_weight(key: Any, item: Tensor, weights: Mapping[str, Tensor]) -> bool:
    live = weights.get(key.removeprefix(_PREFIX)) if isinstance(key, str) else None
    return live is not None and live.shape == item.shape


def mended(checkpoint: Mapping[str, Any], learner: Learner, good: Mapping[learners.StateKey, Any]) -> dict[str, Any]:
    """A checkpoint with a good state in the place of its own; the clock in it stays.

    Args:
        checkpoint: What was about to be written; it is not changed.
        learner: The learner it was made from.
        good: The state to put in, path by path, such as a snapshot's leaves.
    """
    weights = {path[1]: leaf for path, leaf in good.items() if path[0] in ("parameter", "buffer")}
    averages: dict[str, dict[str, Tensor]] = {}
    for path, leaf in good.items():
        if path[0] == "average":
            averages.setdefault(path[1], {})[path[2].removeprefix(_PREFIX)] = leaf
    swapped = "current_model_state" in checkpoint  # WeightAveraging saves the average as the weights
    optimizers = [_optimizer_state(learner, index, good) for index in range(len(learner.optimizers))]

    def mend(value: Any, where: tuple[str, ...]) -> Any:
        if isinstance(value, Mapping):
            if _is_optimizer(value):
                return _fitting(value, optimizers)
            averaged = where[:1] == ("callbacks",) or (swapped and where == ("state_dict",))
            names = {key for key, item in value.items() if isinstance(item, Tensor) and _is_weight(key, item, weights)}
            source = _source(names, averages.values(), weights) if averaged else weights
            return {
                key: source[key.removeprefix(_PREFIX)] if key in names else mend(item, (*where, str(key)))
                for key, item in value.items()
            }
        if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
            return type(value)(mend(item, (*where, str(number))) for number, item in enumerate(value))
        return value

    result: dict[str, Any] = mend(checkpoint, ())
    return result


def _source(names: set[str], averages: Iterable[dict[str, Tensor]], weights: dict[str, Tensor]) -> Mapping[str, Tensor]:
    wanted = {name.removeprefix(_PREFIX) for name in names}
    fitting = next((average for average in averages if wanted <= average.keys()), {})
    return {**weights, **fitting}


def _optimizer_state(learner: Learner, index: int, good: Mapping[learners.StateKey, Any]) -> dict[str, Any]:
    """State and what groups keep of an optimizer in a good state, numbered as its ``state_dict()`` numbers them."""
    names = learner.parameter_names()
    packed = learner.optimizers[index].state_dict()
    by_name: dict[str, dict[Any, Any]] = {}
    for path, leaf in good.items():
        if path[:2] == ("optimizer", index):
            by_name.setdefault(path[2], {})[path[3]] = leaf
    parameters = [p for group in learner.optimizers[index].param_groups for p in group["params"]]
    keys = [key for group in packed["param_groups"] for key in group["params"]]
    named = [names.get(id(parameter), f"#{id(parameter)}") for parameter in parameters]
    state = {key: by_name[name] for key, name in zip(keys, named, strict=True) if name in by_name}
    own = [
        {path[3]: leaf for path, leaf in good.items() if path[:3] == ("group", index, number)}
        for number in range(len(packed["param_groups"]))
    ]
    return {"state": state, "param_groups": own, "sizes": _sizes(packed)}


def _fitting(value: Mapping[str, Any], optimizers: Sequence[dict[str, Any]]) -> Any:
    for good in optimizers:
        if good["sizes"] == _sizes(value):
            groups = [{**group, **own} for group, own in zip(value["param_groups"], good["param_groups"], strict=True)]
            return {**value, "state": good["state"], "param_groups": groups}
    return value


def _sizes(packed: Mapping[str, Any]) -> list[int]:
    return [len(group["params"]) for group in packed["param_groups"]]


def damage(path: Path) -> str:
    """Why a checkpoint file is not whole, ``""`` where it is or where nothing can be said (a folder, an old format).

    Cut short, a file lacks the zip directory at its end. Blocks lost in between, as a power failure leaves them, do not
    match their checksums, which ``torch.load`` does not look at.
    """
    if not path.is_file():
        return ""
    if not zipfile.is_zipfile(path):
        size = path.stat().st_size
        return f"it is cut short, or no checkpoint ({size:,} bytes without a zip directory at the end)"
    # Not every process writes checksums: whoever turned them off has none to look at.
    checked = getattr(torch.serialization, "get_crc32_options", lambda: True)()
    try:
        with zipfile.ZipFile(path) as file:
            record = file.testzip() if checked else None
    except (OSError, zipfile.BadZipFile) as error:
        return f"it cannot be read ({error})"
    return f"its record {record} does not match its checksum" if record is not None else ""


def inspect(
    path: Path, weights: Mapping[str, Tensor] | None = None, allowed: Mapping[learners.StateKey, Tensor] | None = None
) -> Inspection:
    """Look into a checkpoint file, on the CPU and without running code from it.

    Args:
        path: The file.
        weights: The module's parameters and buffers; ``None`` goes by the names in the file's ``state_dict``.
        allowed: Where buffers are non-finite by design; ``None`` allows −inf in whatever is a mask by its name.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder) / "bad.ckpt"
        ...     torch.save({"global_step": 7, "state_dict": {"w": torch.tensor([float("inf")])}}, path)
        ...     inspect(path).tensors
        ('state_dict: w',)
    """
    if path.is_dir():
        return Inspection(path, "it is a folder of shards, whose index is a pickle and is not opened here")
    try:
        wrong = damage(path)
        if wrong:
            return Inspection(path, wrong)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever keeps torch from reading it keeps a run from going on from it
        return Inspection(path, f"it cannot be read ({type(error).__name__}: {str(error).splitlines()[0]})")
    if not isinstance(checkpoint, Mapping) or not isinstance(checkpoint.get("state_dict"), Mapping):
        return Inspection(path, "it holds no state_dict")
    if weights is None:
        weights = {name: value for name, value in checkpoint["state_dict"].items() if isinstance(value, Tensor)}
    if allowed is None:
        allowed = {("buffer", name): value == -torch.inf for name, value in weights.items() if "mask" in name}
    step = checkpoint.get("global_step")
    return Inspection(
        path,
        "",
        tuple(poisoned(checkpoint, weights, allowed)),
        step if isinstance(step, int) else None,
        "optimizer_states" in checkpoint and "loops" in checkpoint,
    )


def newest_good(
    folders: Iterable[Path],
    *,
    other_than: Path | None = None,
    weights: Mapping[str, Tensor] | None = None,
    allowed: Mapping[learners.StateKey, Tensor] | None = None,
) -> Inspection | None:
    """The newest checkpoint file in some folders that a run may go on from, by its time of writing.

    Args:
        folders: Where to look; one that does not exist is left out.
        other_than: A file that is not wanted.
        weights: See :func:`inspect`.
        allowed: See :func:`inspect`.
    """
    unwanted = other_than.resolve() if other_than is not None else None
    files = {
        file.resolve() for folder in folders if folder.is_dir() for file in folder.glob("*.ckpt") if file.is_file()
    }
    for file in sorted(files - {unwanted}, key=lambda file: (file.stat().st_mtime_ns, str(file)), reverse=True):
        found = inspect(file, weights, allowed)
        if found.good():
            return found
    return None

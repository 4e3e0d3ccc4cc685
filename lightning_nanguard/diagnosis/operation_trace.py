"""Follows a forward pass operation by operation, to find where the first non-finite value was made."""

from __future__ import annotations

import math
import os
import sys
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from types import FrameType
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from lightning_nanguard.diagnosis.batch import true_indices
from lightning_nanguard.diagnosis.case import Origin
from lightning_nanguard.measure.finite import all_finite
from lightning_nanguard.measure.tensors import dense_values
from lightning_nanguard.thresholds.diagnosis import ReplayThresholds

LIBRARIES = (
    "torch",
    "pytorch_lightning",
    "lightning",
    "lightning_fabric",
    "lightning_utilities",
    "torchmetrics",
    "lightning_nanguard",
)
"""Packages whose code is not the user's."""

# What these make holds whatever was in memory before.
_UNINITIALISED = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})
_REPLAY = ReplayThresholds()
_NONE: frozenset[str] = frozenset()
_MASK = frozenset({"mask"})
# Index of the argument that an operation divides by, or takes the logarithm of.
_DENOMINATOR = {"div": 1, "true_divide": 1, "divide": 1, "remainder": 1, "fmod": 1, "addcdiv": 2, "xlogy": 1}


@final
class RunningModules:
    """Knows which module is running, and later, which one a node of the autograd graph comes from."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._handles: list[RemovableHandle] = []
        self._running: list[tuple[str, int]] = []
        self._spans: list[tuple[int, int, str]] = []

    def __enter__(self) -> RunningModules:
        for path, one in self._module.named_modules():
            if not isinstance(one, torch.jit.ScriptModule):
                name = path.replace("_orig_mod.", "")  # torch.compile puts a level of its own between
                enter = one.register_forward_pre_hook(partial(self._enter, name), prepend=True)
                self._handles += [enter, one.register_forward_hook(self._leave, always_call=True)]
        return self

    def __exit__(self, *error: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _enter(self, name: str, module: nn.Module, args: Any) -> None:
        self._running.append((name, _sequence()))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._running:
            name, since = self._running.pop()
            self._spans.append((since, _sequence(), name))

    def current(self) -> str:
        """Path of the module that is running; empty for the one that is trained itself."""
        return self._running[-1][0] if self._running else ""

    def of_node(self, node: Any) -> str:
        """Path of the module that made a node of the graph."""
        number = node._sequence_nr()
        # The inner ones leave first.
        return next((name for since, until, name in self._spans if since <= number < until), "")


def _sequence() -> int:
    return int(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]


@final
class OperationTrace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every operation: what its result depends on, and where non-finite values come from.

    Both are kept by storage, so that views share them. Non-finite values that are put in on purpose (a mask of −inf)
    have an origin only where they come through to the loss, and one that does not reach the loss is of no interest.

    Args:
        modules: Knows which module is running.
        labels: What is known of tensors from the start, by :func:`storage_key`: ``"weights"``, ``"target"``. What
            comes out of a comparison is labelled ``"mask"``.
        size: Samples in the batch.
        purposeful: Whether the origin may be one of values that were put in on purpose, since nothing else is known
            that is not finite.
        thresholds: How far back an exception is followed.
    """

    def __init__(
        self,
        modules: RunningModules,
        labels: dict[int, frozenset[str]],
        size: int,
        *,
        purposeful: bool = True,
        thresholds: ReplayThresholds = _REPLAY,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._modules = modules
        self._labels = labels
        self._size = size
        self._purposeful = purposeful
        self._origins: dict[int, Origin] = {}
        # Where values that were put in on purpose came together with others, and whether they did so far.
        self._purposes: dict[int, tuple[Origin, bool]] = {}
        self._made_by: dict[int, str] = {}
        self._recent: deque[set[int]] = deque(maxlen=thresholds.recent_operations)
        self._last: tuple[Any, Any, list[Tensor], str] | None = None

    def origin_of(self, tensor: Tensor) -> Origin | None:
        """Where a tensor's non-finite values were first made; ``None`` if it has none, or they have no origin."""
        return None if all_finite(tensor.detach()) else self._known([storage_key(tensor)])

    def origin_of_exception(self, error: Exception) -> Origin | None:
        """Where the non-finite value was made that a check has raised about, or the operation that raised itself."""
        found = next((one for keys in reversed(self._recent) if (one := self._known(keys))), None)
        unsolved = isinstance(error, torch.linalg.LinAlgError)  # type: ignore[attr-defined]
        if found is not None or self._last is None or not unsolved:
            return found
        func, args, made, module = self._last
        origin = replace(self._describe(func, args, {}, made[0], _NONE), module=module, line=line_of(error))
        # Solvers give a code for each matrix.
        codes = [one for one in made if not one.is_floating_point() and one.dim() and len(one) == self._size]
        failed = codes[-1].reshape(self._size, -1).any(1) if codes else None
        return replace(origin, samples=() if failed is None or bool(failed.all()) else true_indices(failed))

    def _known(self, keys: Iterable[int]) -> Origin | None:
        keys = [*keys]
        purposes = (self._purposes[key][0] for key in keys if key in self._purposes)
        return next((self._origins[key] for key in keys if key in self._origins), next(purposes, None))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = _tensors((args, kwargs) if kwargs else args)
        mutated = _mutates(func)
        before = non_finite(inputs) if mutated else None
        sources = {storage_key(one) for one in inputs}
        self._recent.append(sources)
        result = func(*args, **kwargs)
        # What shares memory with what went in, and wrote nothing there, is a view, and known already.
        made = [one for one in _tensors(result) if mutated or storage_key(one) not in sources]
        if made:
            self._last = func, args, made, self._modules.current()
        known = [found for source in sources if (found := self._labels.get(source))]
        labels = known[0].union(*known[1:]) if known else _NONE
        for one in made:
            key = storage_key(one)
            self._labels[key] = labels | _MASK if one.dtype == torch.bool else labels
            self._made_by[key] = operation_name(func)
            if key not in sources:
                self._origins.pop(key, None)  # memory used before
                self._purposes.pop(key, None)
        bad = non_finite(made)
        if bad:
            self._trace(func, args, kwargs, inputs, bad, non_finite(inputs) if before is None else before, labels)
        return result

    def _trace(
        self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], bad: list[Tensor], before: list[Tensor],
        labels: frozenset[str],
    ) -> None:  # fmt: skip
        keys = [storage_key(one) for one in bad]
        given = [storage_key(one) for one in before]
        origin = next((self._origins[key] for key in given if key in self._origins), None)
        purpose = next((self._purposes[key] for key in given if key in self._purposes), None)
        if origin is None and self._is_origin(func, args, kwargs, bad, before):
            origin = self._describe(func, args, kwargs, bad[0], labels)
            if purpose is not None and purpose[0].given:
                origin = purpose[0]  # NaN that is made of an Inf that came from outside begins there
        if origin is not None:
            self._origins.update((key, origin) for key in keys)
            return
        with_others, reduced = len(inputs) > 1, bool(before) and before[0].dim() > bad[0].dim()
        put_in = _puts_in(args, kwargs) or any(map(self._comes_bad, before))
        if purpose is None and self._purposeful and put_in:
            purpose = self._put_in(func, args, kwargs, bad[0], labels), bool(before) and with_others
        elif purpose is not None and not purpose[1] and (with_others or reduced):
            purpose = self._put_in(func, args, kwargs, bad[0], labels), True
        if purpose is not None:
            self._purposes.update((key, purpose) for key in keys)

    def _put_in(self, func: Any, args: Any, kwargs: Any, bad: Tensor, labels: frozenset[str]) -> Origin:
        return replace(self._describe(func, args, kwargs, bad, labels), put_in=True)

    def _is_origin(self, func: Any, args: Any, kwargs: Any, bad: list[Tensor], before: list[Tensor]) -> bool:
        if operation_name(func) in _UNINITIALISED:
            return False
        if _puts_in(args, kwargs):
            return False
        if not before:
            return True
        # Of −inf that was put in on purpose NaN can still be made, such as by the softmax of a row that is all masked.
        return not _mutates(func) and any(map(_has_nan, bad)) and not any(map(_has_nan, before))

    def _describe(self, func: Any, args: Any, kwargs: Any, bad: Tensor, labels: frozenset[str]) -> Origin:
        name = operation_name(func)
        index = _DENOMINATOR.get(name, 0)
        operand = args[index] if len(args) > index else None
        if index and isinstance(operand, Tensor):
            labels = self._labels.get(storage_key(operand), _NONE)
        lowest, highest, smallest, empty = operand_range(operand)
        return Origin(
            operation=name,
            module=self._modules.current(),
            line=user_line(),
            dtype=str(bad.dtype).removeprefix("torch."),
            samples=bad_samples(bad, self._size),
            lowest=lowest,
            highest=highest,
            smallest=smallest,
            exponent=operand_range(args[1])[0] if name == "pow" and len(args) > 1 else None,
            from_weights="weights" in labels,
            from_target="target" in labels,
            from_mask="mask" in labels,
            empty=empty,
            given=self._bad_arguments(func, args, kwargs),
            made_by=self._made_by.get(storage_key(operand), "") if isinstance(operand, Tensor) else "",
        )

    def _bad_arguments(self, func: Any, args: Any, kwargs: Any) -> str:
        """Arguments that hold NaN or +Inf which no operation of this pass has made; a mask of −inf is none."""
        names = [one.name for one in func._schema.arguments]
        named = [*zip(names, args, strict=False), *kwargs.items()]
        bad = (name for name, one in named if isinstance(one, Tensor) and self._comes_bad(one))
        return ", ".join(bad)

    def _comes_bad(self, tensor: Tensor) -> bool:
        if storage_key(tensor) in self._made_by or not tensor.is_floating_point():
            return False
        return not bool((dense_values(tensor.detach()) < math.inf).all())


def _puts_in(args: Any, kwargs: Any) -> bool:
    """Whether an operation was given a number that is not finite, as a mask is made with."""
    return any(isinstance(leaf, float) and not math.isfinite(leaf) for leaf in leaves((args, kwargs)))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    found: list[Tensor] = []
    for item in value:  # mostly tensors and numbers: this runs for every operation
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (list, tuple, Mapping)):
            found += _tensors(item)
    return found


@cache
def _mutates(func: Any) -> bool:
    return bool(func._schema.is_mutable)


def leaves(value: Any) -> Iterator[Any]:
    """Everything in nested mappings and sequences."""
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        yield value
        return
    for item in value:
        yield from leaves(item)


def storage_key(tensor: Tensor) -> int:
    """A number that tensors share whose memory is the same."""
    if tensor.layout != torch.strided or is_lazy(tensor):
        return -id(tensor)
    return tensor.untyped_storage().data_ptr() or -id(tensor)


def operation_name(func: Any) -> str:
    """Name of an operation, without underscores at its ends."""
    return str(func._schema.name).split("::")[-1].strip("_")


def non_finite(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors that hold NaN or Inf."""
    floating = (one for one in tensors if one.is_floating_point() or one.is_complex())
    return [one for one in floating if not _has_finite_sum(one) and not all_finite(one)]


def _has_finite_sum(tensor: Tensor) -> bool:
    """Whether the sum is finite, which proves every element finite; a cheap first look at a tensor of plain layout."""
    return tensor.layout == torch.strided and not tensor.is_complex() and math.isfinite(float(tensor.detach().sum()))


def _has_nan(tensor: Tensor) -> bool:
    return bool(torch.isnan(dense_values(tensor)).any())


def bad_samples(tensor: Tensor, size: int) -> tuple[int, ...]:
    """Samples with a value that is not finite; empty if all have one, or they cannot be told."""
    if tensor.layout != torch.strided or tensor.dim() == 0 or len(tensor) != size:
        return ()
    bad = ~torch.isfinite(tensor.detach()).reshape(size, -1).all(1)
    return () if bool(bad.all()) else true_indices(bad)


def operand_range(operand: Any) -> tuple[float | None, float | None, float | None, bool]:
    """Smallest and largest finite number, smallest magnitude, and whether there is nothing at all."""
    if isinstance(operand, (list, tuple)):
        operand = next((item for item in operand if isinstance(item, Tensor)), None)
    if isinstance(operand, (int, float)):
        return float(operand), float(operand), abs(float(operand)), False
    if not isinstance(operand, Tensor) or operand.layout != torch.strided or operand.is_complex():
        return None, None, None, False
    values = operand.detach().double()
    finite = values[torch.isfinite(values)]
    if not finite.numel():
        return None, None, None, not values.numel()
    return float(finite.min()), float(finite.max()), float(finite.abs().min()), False


def user_line() -> str:
    """``file.py:12``: the innermost line running that is in no library."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if _is_users(frame):
            return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def line_of(error: BaseException) -> str:
    """``file.py:12``: the innermost line of an exception that is in no library."""
    lines = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__) if _is_users(frame)]
    return f"{os.path.basename(lines[-1][0].f_code.co_filename)}:{lines[-1][1]}" if lines else ""


def _is_users(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).split(".")[0] not in LIBRARIES

"""Traces a forward pass operation by operation, to find the origin of the first non-finite value."""

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
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from lightning_nanguard.diagnosis.batch import true_indices
from lightning_nanguard.diagnosis.case import Origin
from lightning_nanguard.measure.finite import all_finite, bad_unless_masked, has_nan
from lightning_nanguard.measure.tensors import dense_values
from lightning_nanguard.thresholds.fixed import RECENT_OPERATIONS

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

# The results of these operations are uninitialised memory.
_UNINITIALISED = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})
_NONE: frozenset[str] = frozenset()
_MASK = frozenset({"mask"})
# Matrix products whose first argument is added to the product.
_WITH_SUMMAND = frozenset({"addmm", "addmv", "addbmm", "baddbmm", "addr"})
# Index of the divisor, or of the argument of a logarithm.
_DENOMINATOR = {"div": 1, "true_divide": 1, "divide": 1, "remainder": 1, "fmod": 1, "addcdiv": 2, "xlogy": 1}


@final
class RunningModules:
    """Tracks which module is running, and maps nodes of the autograd graph to modules."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._handles: list[RemovableHandle] = []
        self._running: list[tuple[str, int]] = []
        self._spans: list[tuple[int, int, str]] = []

    def __enter__(self) -> RunningModules:
        for path, one in self._module.named_modules():
            if not isinstance(one, torch.jit.ScriptModule):
                name = path.replace("_orig_mod.", "")  # torch.compile adds this level
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
        """Path of the module that is running; empty for the trained module itself."""
        return self._running[-1][0] if self._running else ""

    def of_node(self, node: Any) -> str:
        """Path of the module that created a node of the graph."""
        number = node._sequence_nr()
        # Spans of inner modules come first, because inner modules return first.
        return next((name for since, until, name in self._spans if since <= number < until), "")


def _sequence() -> int:
    return int(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]


class _Call(NamedTuple):
    """One operation that was run, with its arguments.

    Attributes:
        func: The operation.
        args: Its arguments.
        kwargs: Its keyword arguments.
        before: Its tensors that held NaN or Inf before.
        labels: The labels of its tensors.
    """

    func: Any
    args: Any
    kwargs: Any
    before: list[Tensor]
    labels: frozenset[str]


@final
class OperationTrace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Traces for every operation the inputs of its result, and the origin of non-finite values.

    Both are kept by storage, so that views share them. Non-finite values that were inserted on purpose, such as a mask
    of −inf, get an origin only if they reach the loss.

    Args:
        modules: Knows which module is running.
        labels: Labels of tensors by :func:`storage_key`, such as ``"weights"`` or ``"target"``. Results of comparisons
            get the label ``"mask"``.
        size: Number of samples in the batch.
        purposeful: Whether values that were inserted on purpose may be the origin, because no other non-finite value is
            known.
    """

    def __init__(
        self,
        modules: RunningModules,
        labels: dict[int, frozenset[str]],
        size: int,
        *,
        purposeful: bool = True,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._modules = modules
        self._labels = labels
        self._size = size
        self._purposeful = purposeful
        self._origins: dict[int, Origin] = {}
        # Where values that were inserted on purpose were combined with others, and whether this has happened yet.
        self._purposes: dict[int, tuple[Origin, bool]] = {}
        self._made_by: dict[int, str] = {}
        self._recent: deque[set[int]] = deque(maxlen=RECENT_OPERATIONS)
        # The newest operation, its results, and its module.
        self._last: tuple[_Call, list[Tensor], str] | None = None

    def origin_of(self, tensor: Tensor) -> Origin | None:
        """The origin of a tensor's non-finite values; ``None`` if it has none, or their origin is not known."""
        return None if all_finite(tensor.detach()) else self._known([storage_key(tensor)])

    def origin_of_exception(self, error: Exception) -> Origin | None:
        """The origin of the non-finite value that caused an exception, or the operation that raised it."""
        found = next((one for keys in reversed(self._recent) if (one := self._known(keys))), None)
        unsolved = isinstance(error, torch.linalg.LinAlgError)  # type: ignore[attr-defined]
        if found is not None or self._last is None or not unsolved:
            return found
        call, made, module = self._last
        origin = replace(self._describe(call, made[0]), module=module, line=line_of(error))
        # Solvers return an error code for each matrix.
        codes = [one for one in made if not one.is_floating_point() and one.dim() and len(one) == self._size]
        failed = codes[-1].reshape(self._size, -1).any(1) if codes else None
        return replace(origin, samples=() if failed is None or bool(failed.all()) else true_indices(failed))

    def _known(self, keys: Iterable[int]) -> Origin | None:
        keys = [*keys]
        purposes = (self._purposes[key][0] for key in keys if key in self._purposes)
        return next((self._origins[key] for key in keys if key in self._origins), next(purposes, None))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = tensors_in((args, kwargs) if kwargs else args)
        mutated = _mutates(func)
        before = non_finite(inputs) if mutated else None
        sources = {storage_key(one) for one in inputs}
        self._recent.append(sources)
        result = func(*args, **kwargs)
        # A result that shares memory with an input and was not written is a view, and already known.
        made = [one for one in tensors_in(result) if mutated or storage_key(one) not in sources]
        if made:
            self._last = _Call(func, args, {}, [], _NONE), made, self._modules.current()
        known = [found for source in sources if (found := self._labels.get(source))]
        labels = known[0].union(*known[1:]) if known else _NONE
        for one in made:
            key = storage_key(one)
            self._labels[key] = labels | _MASK if one.dtype == torch.bool else labels
            self._made_by[key] = operation_name(func)
            if key not in sources:
                self._origins.pop(key, None)  # the memory is reused
                self._purposes.pop(key, None)
        bad = non_finite(made)
        if bad:
            before = non_finite(inputs) if before is None else before
            self._trace(_Call(func, args, kwargs, before, labels), bad, with_others=len(inputs) > 1)
        return result

    def _trace(self, call: _Call, bad: list[Tensor], *, with_others: bool) -> None:
        before = call.before
        keys = [storage_key(one) for one in bad]
        given = [storage_key(one) for one in before]
        origin = next((self._origins[key] for key in given if key in self._origins), None)
        purpose = next((self._purposes[key] for key in given if key in self._purposes), None)
        if origin is None and self._is_origin(call, bad):
            origin = self._describe(call, bad[0])
            if purpose is not None and purpose[0].given:
                origin = purpose[0]  # the origin of this NaN is the Inf from outside
        if origin is not None:
            self._origins.update((key, origin) for key in keys)
            return
        reduced = bool(before) and before[0].dim() > bad[0].dim()
        put_in = _puts_in(call) or any(map(self._comes_bad, before))
        if purpose is None and self._purposeful and put_in:
            purpose = replace(self._describe(call, bad[0]), put_in=True), bool(before) and with_others
        elif purpose is not None and not purpose[1] and (with_others or reduced):
            purpose = replace(self._describe(call, bad[0]), put_in=True), True
        if purpose is not None:
            self._purposes.update((key, purpose) for key in keys)

    def _is_origin(self, call: _Call, bad: list[Tensor]) -> bool:
        if operation_name(call.func) in _UNINITIALISED or _puts_in(call):
            return False
        if not call.before:
            return True
        # A −inf that was inserted on purpose can still give NaN, for example in the softmax of a fully masked row.
        return not _mutates(call.func) and any(map(has_nan, bad)) and not any(map(has_nan, call.before))

    def _describe(self, call: _Call, bad: Tensor) -> Origin:
        name, args, labels = operation_name(call.func), call.args, call.labels
        index = _index_of_operand(name, args)
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
            infinite=any(map(_has_infinity, tensors_in(args))),
            given=self._bad_arguments(call),
            made_by=self._made_by.get(storage_key(operand), "") if isinstance(operand, Tensor) else "",
        )

    def _bad_arguments(self, call: _Call) -> str:
        """Arguments with NaN or +Inf that no operation of this pass has computed. A mask of −inf does not count."""
        names = [one.name for one in call.func._schema.arguments]
        named = [*zip(names, call.args, strict=False), *call.kwargs.items()]
        bad = (name for name, one in named if isinstance(one, Tensor) and self._comes_bad(one))
        return ", ".join(bad)

    def _comes_bad(self, tensor: Tensor) -> bool:
        return storage_key(tensor) not in self._made_by and bad_unless_masked(tensor)


def _index_of_operand(name: str, args: Any) -> int:
    """Index of the argument that shows why an operation gave a value that is not finite.

    It is the denominator of a division, and the largest factor of a product: the first argument of ``addmm`` is added.
    """
    if name not in _WITH_SUMMAND:
        return _DENOMINATOR.get(name, 0)
    ranges = [operand_range(one) for one in args[1:3]]
    largest = [max(abs(lowest or 0.0), abs(highest or 0.0)) for lowest, highest, _, _ in ranges]
    return 1 + largest.index(max(largest))


def _has_infinity(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(torch.isinf(dense_values(tensor.detach())).any())


def _puts_in(call: _Call) -> bool:
    """Whether an operation has a non-finite number as argument, as in ``masked_fill(mask, -inf)``."""
    given = leaves((call.args, call.kwargs))
    return any(isinstance(leaf, float) and not math.isfinite(leaf) for leaf in given)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested containers."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    found: list[Tensor] = []
    for item in value:  # checks the common types first, because it runs for every operation
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (list, tuple, Mapping)):
            found += tensors_in(item)
    return found


@cache
def _mutates(func: Any) -> bool:
    return bool(func._schema.is_mutable)


def leaves(value: Any) -> Iterator[Any]:
    """All leaves of nested mappings and sequences."""
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        yield value
        return
    for item in value:
        yield from leaves(item)


def storage_key(tensor: Tensor) -> int:
    """A number that is equal for tensors that share memory."""
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
    """Whether the sum is finite, which proves that every element is finite. This is a cheap first check."""
    return tensor.layout == torch.strided and not tensor.is_complex() and math.isfinite(float(tensor.detach().sum()))


def bad_samples(tensor: Tensor, size: int) -> tuple[int, ...]:
    """Samples with a value that is not finite; empty if all samples have one, or it is not known."""
    if tensor.layout != torch.strided or tensor.dim() == 0 or len(tensor) != size:
        return ()
    bad = ~torch.isfinite(tensor.detach()).reshape(size, -1).all(1)
    return () if bool(bad.all()) else true_indices(bad)


def operand_range(operand: Any) -> tuple[float | None, float | None, float | None, bool]:
    """Smallest and largest finite number, smallest magnitude, and whether the operand is empty."""
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
    """The innermost running line outside libraries, such as ``file.py:12``."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if _is_users(frame):
            return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def line_of(error: BaseException) -> str:
    """The innermost line of an exception outside libraries, such as ``file.py:12``."""
    lines = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__) if _is_users(frame)]
    return f"{os.path.basename(lines[-1][0].f_code.co_filename)}:{lines[-1][1]}" if lines else ""


def _is_users(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).split(".")[0] not in LIBRARIES

"""From gradients and losses to one small reading: one pass over the gradients, at most one read by the host."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, methodcaller
from typing import Any, final

import torch
from torch import Tensor

from lightning_nanguard.events import Reading


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor (``DTensor``, ``ShardedTensor``), on the same memory; any other as it is."""
    if type(tensor) in _PLAIN:
        return tensor
    part = tensor
    if hasattr(tensor, "local_shards"):
        part = next((shard.tensor for shard in tensor.local_shards()), torch.empty(0))
    elif hasattr(tensor, "to_local"):
        part = tensor.detach().to_local()  # type: ignore[attr-defined]
    return part


_PLAIN = (Tensor, torch.nn.Parameter)


def dense_values(gradient: Tensor) -> Tensor:
    """The numbers of a gradient: of a sparse one those it stores, duplicates added up; of a sharded one this rank's."""
    gradient = local(gradient).detach()
    if gradient.is_sparse:
        gradient = gradient.coalesce().values()
    return torch.view_as_real(gradient) if gradient.is_complex() else gradient


def gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The gradients there are; sparse ones as the numbers they store, sharded ones as this rank's part."""
    return plain([gradient for p in parameters if (gradient := p.grad) is not None])


def plain(found: list[Tensor]) -> list[Tensor]:
    """Sparse gradients as the numbers they store, sharded ones as this rank's part, others as they are."""
    if set(map(type, found)) - {Tensor}:
        found = [local(gradient) for gradient in found]
    # One pass in C: a call for each costs more than the norm on a model of many small parameters.
    return [dense_values(g) if g.is_sparse else g for g in found] if any(map(_IS_SPARSE, found)) else found


_IS_SPARSE = attrgetter("is_sparse")
is_at_hand = attrgetter("is_cpu")
"""Whether reading a tensor waits for no device."""

_NUMEL = methodcaller("numel")
_DTYPE = attrgetter("dtype")
_UP_TO_FLOAT = {torch.float16, torch.bfloat16, torch.float32}
# On the CPU, from so many tensors on, one of up to so many elements is cheaper to copy behind the others than to be
# read by itself; so many are copied at once.
_MANY = 100
_SMALL = 4096
_AT_ONCE = 1024


def _on(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    # Without waiting only towards the device: a copy to the host would be read before it has arrived.
    return tensor.to(device, dtype, non_blocking=device.type == "cuda")


def partial_norms(values: list[Tensor]) -> list[Tensor]:
    """2-norms, 0-dim, whose own 2-norm is that over all tensors; fewer than there are tensors where these are small.

    Finite results prove every element finite; the inverse does not hold, since squares overflow.
    """
    norms: list[Tensor] = []
    if len(values) >= _MANY and all(map(is_at_hand, values)):
        sizes = list(map(_NUMEL, values))
        small = [value for value, size in zip(values, sizes, strict=True) if size <= _SMALL]
        values = [value for value, size in zip(values, sizes, strict=True) if size > _SMALL]
        norms = [
            _norm(torch._C._nn.flatten_dense_tensors(small[start : start + _AT_ONCE]))
            for start in range(0, len(small), _AT_ONCE)
        ]
    if len(values) == 1:
        norms.append(_norm(values[0]))
    elif values:
        dtypes = set(map(_DTYPE, values))
        if len(dtypes) == 1 and dtypes.isdisjoint(_WIDER):
            norms += torch._foreach_norm(values)
        elif dtypes <= _UP_TO_FLOAT:
            # Half precision overflows at 65,504, which is no unusual norm.
            norms += torch._foreach_norm(values, 2, torch.float32)
        else:
            norms += map(_norm, values)
    return norms


def each_norm(values: list[Tensor], order: float = 2.0) -> list[Tensor]:
    """A norm of each of several dense tensors of one kind, none of them empty; 0-dim."""
    return list(torch._foreach_norm(values, order, _WIDER.get(values[0].dtype))) if values else []


def total_norm(norms: Sequence[Tensor]) -> Tensor:
    """2-norm of partial norms, a 0-dim float tensor on the first one's device."""
    first = norms[0]
    if len(norms) > 1:
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        if any(norm.device != first.device or norm.dtype != dtype for norm in norms):
            norms = [_on(norm, first.device, dtype) for norm in norms]
        first = torch.linalg.vector_norm(torch.stack(list(norms)))
    return first.detach()  # gradients that keep their graph have a norm that does


def _norm(values: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(values, dtype=_WIDER.get(values.dtype))
    return norm


def norms(tensors: Sequence[Tensor], order: float = 2.0) -> list[float]:
    """A norm of each tensor, 0.0 of an empty one; one read for each device and kind of number."""
    found = [0.0] * len(tensors)
    dense = [dense_values(tensor) if tensor.is_sparse else local(tensor).detach() for tensor in tensors]
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(dense):
        if tensor.numel():
            groups.setdefault((tensor.device, tensor.dtype), []).append(index)
    for (_, dtype), indices in groups.items():
        values = [dense[index] for index in indices]
        numbers = torch.stack(torch._foreach_norm(values, order, _WIDER.get(dtype))).tolist()
        for index, number in zip(indices, numbers, strict=True):
            found[index] = number
    return found


def exact_norm(values: Sequence[Tensor]) -> float:
    """2-norm in float64, for the rare gradient whose squares overflow its own precision. Reads from the device."""
    dense = map(dense_values, values)
    return math.sqrt(sum(float(torch.linalg.vector_norm(value, dtype=torch.float64)) ** 2 for value in dense))


def all_finite(tensor: Tensor) -> bool:
    """Whether every element is finite. Reads from the device."""
    return not suspects([tensor])


def suspects(tensors: Sequence[Tensor]) -> list[int]:
    """Indices of the tensors that hold a non-finite element; one read for each device, one more for each suspect."""
    groups: dict[torch.device, list[int]] = {}
    for index, tensor in enumerate(tensors):
        if (tensor.is_floating_point() or tensor.is_complex()) and tensor.numel() > 0:
            groups.setdefault(tensor.device, []).append(index)
    bad: list[int] = []
    for indices in groups.values():
        values = [dense_values(tensors[index]) for index in indices]
        # A finite norm proves every element finite in one cheap pass.
        if not math.isfinite(float(total_norm(partial_norms(values)))):
            bad += _among(indices, values)
    return sorted(bad)


def _among(indices: Sequence[int], values: Sequence[Tensor]) -> list[int]:
    sums = torch.stack([value.sum(dtype=_WIDER.get(value.dtype)).to(torch.float32) for value in values]).tolist()
    # An infinite one may be an overflow of the sum alone: look at every element.
    return [
        index
        for index, value, total in zip(indices, values, sums, strict=True)
        if not math.isfinite(total) and not bool(torch.isfinite(value).all())
    ]


_WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


def batch_finite(batch: Any) -> bool | None:
    """Whether every floating tensor in a nested batch is finite; ``None`` when it holds no floating tensor."""
    seen = False
    for tensor in floating_tensors(batch):
        seen = True
        if not all_finite(tensor):
            return False
    return True if seen else None


def size(tensor: Tensor) -> int:
    """Bytes of the numbers a tensor stores."""
    return size(tensor.coalesce().values()) if tensor.is_sparse else tensor.numel() * tensor.element_size()


def largest_magnitudes(batch: Any) -> list[float]:
    """Largest absolute value of every floating tensor in a nested batch. Reads from the device."""
    tensors = [dense_values(tensor) for tensor in floating_tensors(batch) if tensor.numel() > 0]
    return [float(tensor.abs().max()) for tensor in tensors]


def floating_tensors(batch: Any) -> Iterator[Tensor]:
    """Every floating tensor in nested mappings and sequences."""
    return (tensor for tensor in nested_tensors(batch) if tensor.is_floating_point() or tensor.is_complex())


def nested_tensors(batch: Any) -> Iterator[Tensor]:
    """Every tensor in nested mappings and sequences."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for item in batch.values():
            yield from nested_tensors(item)
    elif isinstance(batch, (list, tuple)):
        for item in batch:
            yield from nested_tensors(item)


def mapped(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The batch with every tensor in nested mappings and sequences replaced by what ``function`` makes of it."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: mapped(item, function) for key, item in batch.items()}
    if isinstance(batch, (list, tuple)):
        items = [mapped(item, function) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    return batch


@final
class Parcel:
    """A few numbers on their way to the host, sent without waiting for the device.

    Args:
        numbers: One-dimensional, on any device.
    """

    def __init__(self, numbers: Tensor) -> None:
        cuda = numbers.is_cuda
        self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=cuda)
        self._host.copy_(numbers, non_blocking=True)
        self._done: Any = None
        if cuda:
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record(torch.cuda.current_stream(numbers.device))

    def arrived(self) -> bool:
        """Whether reading it would not wait for the device."""
        return self._done is None or bool(self._done.query())

    def read(self) -> list[float]:
        """The numbers; waits until they are there."""
        if self._done is not None:
            self._done.synchronize()
        numbers: list[float] = self._host.tolist()
        return numbers


@final
@dataclass(slots=True)
class PendingReading:
    """One update's loss and gradient norm, on the device or on their way to the host.

    Attributes:
        step: The guard's clock.
        stream: Index of the optimizer.
        loss: Sum of the losses as they were given to ``backward``, 0-dim; ``None`` without one.
        norms: Partial gradient norms, 0-dim, from :func:`partial_norms`; none without a gradient.
        loss_scale: A GradScaler's scale; ``None`` without one.
        loss_factor: What undoes the division of the loss by the number of micro-batches.
        gradients_scaled: Whether the gradients are multiplied by the scale, as the loss is.
        held_back: Whether the device itself keeps a bad update from the weights.
    """

    step: int
    stream: int
    loss: Tensor | None
    norms: Sequence[Tensor]
    loss_scale: Tensor | None = None
    loss_factor: float = 1.0
    gradients_scaled: bool = False
    held_back: bool = False
    _parcel: Parcel | None = field(default=None, init=False)
    _packed: Tensor | None = field(default=None, init=False)

    def packed(self) -> Tensor:
        """Norm, loss and loss scale, as far as there are any, as one tensor on the norm's device."""
        if self._packed is None:
            norm = [total_norm(self.norms)] if self.norms else []
            parts = [*norm, *(part for part in (self.loss, self.loss_scale) if part is not None)]
            device = parts[0].device
            dtype = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
            self._packed = torch.stack([_on(part, device, dtype) for part in parts])
        return self._packed

    def send(self) -> None:
        """Start the copy to the host without waiting for the device."""
        self._parcel = Parcel(self.packed())

    def is_bad(self, *, by_loss: bool = True) -> Tensor:
        """1.0 where loss or norm is not finite, else 0.0; a 0-dim float32 tensor on the device.

        Args:
            by_loss: Whether the loss counts; where ranks have losses of their own it must not.
        """
        packed = self.packed() if by_loss else self.packed()[: bool(self.norms)]
        # What is finite less itself is 0, what is not is NaN.
        return (packed - packed).sum().ne(0).to(torch.float32)

    def arrived(self) -> bool:
        """Whether reading it would not wait for the device."""
        return self._parcel is None or self._parcel.arrived()

    def read(self, confirm: Callable[[], float | None] | None = None) -> Reading:
        """Bring it to the host.

        Args:
            confirm: Called when the norm is not finite; gives the exact norm of a gradient that is finite after
                all, ``None`` when it truly is not.
        """
        norm, loss, scale = self._numbers()
        if loss is not None:
            loss *= self.loss_factor
        finite_gradient = norm is None or math.isfinite(norm)
        if not finite_gradient and confirm is not None:
            exact = confirm()
            if exact is not None:
                norm, finite_gradient = exact, True
        if scale is not None:
            loss = None if loss is None else loss / scale
            norm = norm / scale if norm is not None and self.gradients_scaled else norm
        loss_finite = loss is None or math.isfinite(loss)
        return Reading(
            step=self.step,
            stream=self.stream,
            loss=loss,
            grad_norm=norm,
            finite=finite_gradient and loss_finite,
            loss_finite=loss_finite,
            loss_scale=scale,
        )

    def _numbers(self) -> tuple[float | None, float | None, float | None]:
        numbers = iter(self.packed().tolist() if self._parcel is None else self._parcel.read())
        return (
            next(numbers) if self.norms else None,
            None if self.loss is None else next(numbers),
            None if self.loss_scale is None else next(numbers),
        )


def pend(
    *,
    step: int,
    stream: int,
    losses: Sequence[Tensor],
    loss_factor: float,
    norms: Sequence[Tensor],
    loss_scale: Tensor | None = None,
    gradients_scaled: bool = False,
) -> PendingReading | None:
    """Put together what was measured of one update; ``None`` where nothing was.

    Args:
        step: The guard's clock.
        stream: Index of the optimizer.
        losses: The update's micro-batch losses, as they were given to ``backward``.
        loss_factor: What undoes the division by the number of micro-batches.
        norms: Of its gradients, from :func:`partial_norms`.
        loss_scale: The GradScaler's scale; losses are multiplied by it, and gradients when ``gradients_scaled``.
    """
    if not losses and not norms:
        return None
    return PendingReading(step, stream, _sum(losses), norms, loss_scale, loss_factor, gradients_scaled)


def _sum(losses: Sequence[Tensor]) -> Tensor | None:
    if not losses:
        return None
    first = losses[0]
    if len(losses) == 1 and first.dim() == 0:
        return first
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    return torch.cat([_on(part.reshape(-1), first.device, dtype) for part in losses]).sum()

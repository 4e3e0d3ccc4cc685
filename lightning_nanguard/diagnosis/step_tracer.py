"""Finds out what a step takes: parameters, and constants that are made of the trained weights themselves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_nanguard.diagnosis.operation_trace import operation_name, storage_key, tensors_in
from lightning_nanguard.measure.tensors import is_strided
from lightning_nanguard.state.device import OutOfMemory

# Operations that draw from a distribution whose parameters are tensors.
_DRAWS = frozenset({"multinomial", "bernoulli", "normal", "poisson", "binomial", "standard_gamma", "sample_dirichlet"})
# With these overloads the first argument only says where to write, or of which shape.
_WITH_SHAPE = frozenset({"p", "Tensor"})


@final
@dataclass(frozen=True, slots=True)
class StepTrace:
    """What a traced step takes.

    Attributes:
        own_targets: Whether its loss takes constants that are made of the trained weights (:class:`StepTracer`).
        writes: Whether the step itself writes to the trained weights.
        unused: Names of the module's parameters that it does not use, such as an averaged copy of the weights.
    """

    own_targets: bool
    writes: bool
    unused: frozenset[str]


def copies_of(weights: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]] | None:
    """The strided weights, each with a copy, for :func:`put_back`; ``None`` if memory is too short."""
    with suppress(OutOfMemory):
        return [(weight, weight.detach().clone()) for weight in weights if is_strided(weight)]
    return None


def put_back(copies: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Restore the weights that a step has written to; return whether there are any."""
    written = [(weight, copy) for weight, copy in copies if not torch.equal(weight, copy)]
    with torch.no_grad():
        for weight, copy in written:
            weight.copy_(copy)
    return bool(written)


@final
class StepTracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Traces a forward pass, and finds unused parameters and constants that are made of the trained weights.

    A loss may measure the model against something that the weights themselves determine, without a gradient through it:
    samples that are drawn from the model, detached outputs as targets, codes of a codebook, adversarial inputs,
    advantages. Under other weights the step has other constants, so its loss does not show which weights are better.

    Such a constant is a tensor that was drawn from a distribution which depends on the weights, or that was computed
    from them without a graph, and that an operation combines with tensors that have a gradient. Noise that does not
    depend on the weights does not count, as in dropout, a variational autoencoder or diffusion. Neither do masks and
    indices that are computed within the graph, as those of a hinge, of a router or of the hardest negatives.

    Args:
        weights: The trained weights.
        parameters: All parameters of the module, with their names.

    Attributes:
        own_targets: Whether the step takes such a constant.
    """

    def __init__(self, weights: Iterable[Tensor], parameters: Iterable[tuple[str, Tensor]] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # What was computed from the weights, by storage, so that views share it; and which of it has no gradient.
        self._of_weights = {storage_key(one) for one in weights}
        self._constants: set[int] = set()
        self._unused = {storage_key(one): name for name, one in parameters}
        self.own_targets = False

    @property
    def unused(self) -> frozenset[str]:
        """Names of the parameters that no operation took."""
        return frozenset(self._unused.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and note what it makes of the weights."""
        kwargs = kwargs or {}
        name, tensors = operation_name(func), tensors_in((args, kwargs))
        inputs = {storage_key(one) for one in tensors}
        for one in inputs & self._unused.keys():
            del self._unused[one]
        graph = torch.is_grad_enabled()
        if graph and name != "detach" and any(one.requires_grad for one in tensors):
            self.own_targets |= any(self._constant(one) for one in tensors)
        given = _distribution(func, args, kwargs) if name in _DRAWS else ()
        drawn = any(storage_key(one) in self._of_weights for one in given)
        result = func(*args, **kwargs)
        made = {storage_key(one) for one in tensors_in(result)}
        # Tensors that are made of a shape alone hold nothing of the weights.
        if inputs & self._of_weights and not (name.endswith("_like") or name.startswith("new_")):
            self._of_weights |= made
            if drawn or not graph or name == "detach" or any(self._constant(one) for one in tensors):
                self._constants |= made
        else:
            # The memory is reused.
            self._of_weights -= made - inputs
            self._constants -= made - inputs
        return result

    def _constant(self, tensor: Tensor) -> bool:
        return not tensor.requires_grad and storage_key(tensor) in self._constants


def _distribution(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that a draw takes its distribution from."""
    into = func._schema.is_mutable or func._overloadname in _WITH_SHAPE
    return tensors_in((args[1:] if into else args, kwargs))

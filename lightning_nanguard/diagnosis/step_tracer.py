"""Finds out what a step takes: parameters, and samples that are drawn from the model itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_nanguard.diagnosis.operation_trace import operation_name, storage_key, tensors_in

# Operations that draw from a distribution whose parameters are tensors.
_DRAWS = frozenset({"multinomial", "bernoulli", "normal", "poisson", "binomial", "standard_gamma", "sample_dirichlet"})
# With these overloads the first argument only says where to write, or of which shape.
_WITH_SHAPE = frozenset({"p", "Tensor"})


@final
@dataclass(frozen=True, slots=True)
class StepTrace:
    """What a traced step takes.

    Attributes:
        draws: Whether it draws samples from a distribution that depends on the trained weights.
        unused: Names of the module's parameters that it does not use, such as an averaged copy of the weights.
    """

    draws: bool
    unused: frozenset[str]


@final
class StepTracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Traces a forward pass, and finds unused parameters and draws from a distribution that depends on the weights.

    Under other weights a step with such draws has other samples, so its loss says nothing about which weights are
    better. The noise of dropout, of a variational autoencoder or of diffusion does not depend on the weights, and does
    not count.

    Args:
        weights: The trained weights.
        parameters: All parameters of the module, with their names.

    Attributes:
        draws: Whether there was such a draw.
    """

    def __init__(self, weights: Iterable[Tensor], parameters: Iterable[tuple[str, Tensor]] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # What was computed from the weights, by storage, so that views share it.
        self._of_weights = {storage_key(one) for one in weights}
        self._unused = {storage_key(one): name for name, one in parameters}
        self.draws = False

    @property
    def unused(self) -> frozenset[str]:
        """Names of the parameters that no operation took."""
        return frozenset(self._unused.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and note what it makes of the weights."""
        kwargs = kwargs or {}
        name, inputs = operation_name(func), {storage_key(one) for one in tensors_in((args, kwargs))}
        for one in inputs & self._unused.keys():
            del self._unused[one]
        if name in _DRAWS:
            into = func._schema.is_mutable or func._overloadname in _WITH_SHAPE
            given = tensors_in((args[1:] if into else args, kwargs))
            self.draws |= any(storage_key(one) in self._of_weights for one in given)
        result = func(*args, **kwargs)
        made = {storage_key(one) for one in tensors_in(result)}
        # Tensors that are made of a shape alone hold nothing of the weights.
        if inputs & self._of_weights and not (name.endswith("_like") or name.startswith("new_")):
            self._of_weights |= made
        else:
            self._of_weights -= made - inputs  # the memory is reused
        return result

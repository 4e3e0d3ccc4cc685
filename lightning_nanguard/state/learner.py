"""The learner: the part of a run's state that a rollback restores, as state keys and leaves.

Parameters, buffers, optimizer state (and what optimizers keep in their groups), the GradScaler's growth tracker and
averaged copies are the learner. Learning rates, schedulers and progress are the clock, which no rollback changes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Protocol, final

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import LBFGS, Optimizer

from lightning_nanguard.measure.tensors import local
from lightning_nanguard.state.device import Device
from lightning_nanguard.state.optimizer_attributes import own_leaves

StateKey = tuple[Any, ...]
"""Names one leaf of the learner: ``("parameter", name)``, ``("buffer", name)``, ``("average", owner, name)``,
``("optimizer", index, parameter name, key)``, ``("group", index, group number, key)``, or
``("wrapped", index, attribute, parameter name, key)`` for the state of an optimizer that another one wraps, or
``("own", index, attribute)`` and ``("own", index, attribute, key)`` for what an optimizer keeps in its attributes."""


def unwrapped(name: str) -> str:
    """The name of a tensor without the wrapper around its module: AveragedModel and DDP keep it as ``module``."""
    return name.removeprefix("module.")


# Schedulers write these keys of parameter groups, so they belong to the clock.
CLOCK_KEYS = frozenset(
    {
        "params", "lr", "initial_lr", "max_lr", "min_lr", "swa_lr", "weight_decay",
        "momentum", "base_momentum", "max_momentum", "betas",
    }
)  # fmt: skip


class Scaler(Protocol):
    """What the learner uses of a ``torch.amp.GradScaler``."""

    def state_dict(self) -> dict[str, Any]:
        """Its scale and growth tracker."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set scale and growth tracker."""


class Partitions(Protocol):
    """Partitions that a strategy trains in place of the module's parameters; each process steps its own.

    The strategy makes the parameters from them again after each step, and the parameters have no ``grad`` before it.
    """

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """By name: the part of each parameter that this process keeps, and the tensors it steps."""

    def stepped(self) -> Mapping[str, Tensor]:
        """The tensors that the optimizer steps, by name."""

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """The part of each parameter's gradient that the next step will use, by the parameter's name."""

    def restored(self) -> None:
        """The tensors of :meth:`weights` were restored: drop what was made from their earlier values."""


def states_of(optimizer: Optimizer, index: int) -> Iterator[tuple[StateKey, MutableMapping[Any, Any]]]:
    """What an optimizer keeps of each parameter, and what those keep that it wraps: how its keys begin, and the state.

    Optimizers such as SAM or Lookahead have the moments in another optimizer, which they hold as an attribute.
    """
    yield ("optimizer", index), optimizer.state
    for name, inner in getattr(optimizer, "__dict__", {}).items():
        if isinstance(inner, Optimizer) and inner.state is not optimizer.state:
            yield ("wrapped", index, name), inner.state


def _ready(tensor: Tensor) -> bool:
    return not isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer))


@final
class Learner:
    """Gives the live state of a run that may be restored, as state keys and leaves (tensors and plain values).

    Args:
        module: The module trained.
        optimizers: Its optimizers.
        scaler: The GradScaler, if there is one.
        averages: Gives averaged copies of the module kept elsewhere (EMA, SWA), by name; asked again each time, since
            such copies come and go.
        partitions: What is stepped in place of the parameters, if a strategy keeps partitions of them.
        device: The device of the run.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        scaler: Scaler | None = None,
        averages: Callable[[], Mapping[str, Mapping[str, Tensor]]] = dict,
        partitions: Partitions | None = None,
        device: Device | None = None,
    ) -> None:
        self.module = module
        self.optimizers = list(optimizers)
        # Indices of optimizers that evaluate their closure several times in one step, as a line search does.
        self.quasi_newton = frozenset(i for i, one in enumerate(self.optimizers) if isinstance(one, LBFGS))
        self.scaler = scaler
        self.device = Device() if device is None else device
        self._averages = averages
        self._partitions = partitions

    def weights(self) -> Iterator[tuple[StateKey, Tensor]]:
        """Parameters and buffers (also those that are not persistent)."""
        own = self._partitions
        for name, parameter in self.module.named_parameters() if own is None else own.weights():
            if _ready(parameter):
                yield ("parameter", name), parameter
        for name, buffer in self.module.named_buffers():
            if _ready(buffer):
                yield ("buffer", name), buffer

    def statistics(self, keys: Collection[StateKey]) -> list[StateKey]:
        """Among ``keys`` running statistics of normalisation layers, and averaged copies of weights."""
        prefixes = {name for name, layer in self.module.named_modules() if isinstance(layer, _NormBase)}

        def counts(name: str) -> bool:
            return name.rpartition(".")[0] in prefixes and "num_batches" not in name

        return [
            key
            for key in keys
            if (key[0] == "buffer" and counts(key[1]))
            or (key[0] == "average" and (("parameter", name := unwrapped(key[2])) in keys or counts(name)))
        ]

    def lazy(self) -> bool:
        """Whether a parameter is uninitialised until the first forward."""
        return any(not _ready(parameter) for parameter in self.module.parameters())

    def parameter_names(self) -> dict[int, str]:
        """Identity of every parameter to its name; tied parameters have their first name."""
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        if self._partitions is not None:
            names |= {id(tensor): name for name, tensor in self._partitions.stepped().items()}
        return names

    def stepped(self, index: int) -> list[Tensor]:
        """The tensors that an optimizer steps."""
        if self._partitions is not None:
            return list(self._partitions.stepped().values())
        return [parameter for group in self.optimizers[index].param_groups for parameter in group["params"]]

    def which_have_gradients(self, index: int, found: int) -> tuple[bool, ...] | None:
        """For each tensor that an optimizer steps whether it has a gradient; ``None`` for all of them.

        Args:
            index: Index of the optimizer.
            found: How many gradients there are, so that the tensors need not be looked at where all have one.
        """
        groups = self.optimizers[index].param_groups
        if self._partitions is not None or found == sum(len(group["params"]) for group in groups):
            return None
        return tuple(p.grad is not None for group in groups for p in group["params"])

    def named_sizes(self, index: int) -> list[tuple[str, int]]:
        """Names and numbers of elements of the tensors that an optimizer steps, of sharded ones those of this rank."""
        names = self.parameter_names()
        return [(names.get(id(p), "a parameter"), local(p).numel()) for p in self.stepped(index) if _ready(p)]

    def weights_of(self, index: int) -> list[tuple[StateKey, Tensor]]:
        """Parameters that the steps of an optimizer change."""
        parameters = [(key, leaf) for key, leaf in self.weights() if key[0] == "parameter"]
        if self._partitions is not None:
            return parameters
        own = {id(parameter) for parameter in self.stepped(index)}
        return [(key, leaf) for key, leaf in parameters if id(leaf) in own]

    def gradients(self, index: int) -> list[Tensor]:
        """The gradients an optimizer steps by, as they are: sparse or sharded ones too."""
        if self._partitions is not None:
            return [gradient for _, gradient in self._partitions.gradients()]
        groups = self.optimizers[index].param_groups
        return [grad for group in groups for p in group["params"] if (grad := p.grad) is not None]

    def named_gradients(self, index: int) -> list[tuple[str, Tensor]]:
        """The gradients an optimizer steps by, with the parameters' names."""
        if self._partitions is not None:
            return list(self._partitions.gradients())
        names = self.parameter_names()
        found = [(names.get(id(p), "a parameter"), p.grad) for p in self.stepped(index)]
        return [(name, grad) for name, grad in found if grad is not None]

    def restored(self) -> None:
        """Weights were restored: a strategy that made other tensors from them makes those again."""
        if self._partitions is not None:
            self._partitions.restored()

    def optimizer_leaves(self, index: int) -> Iterator[tuple[StateKey, Any]]:
        """State of one optimizer and what it keeps in its groups."""
        optimizer = self.optimizers[index]
        names = self.parameter_names()
        for prefix, state in states_of(optimizer, index):
            for parameter, entry in state.items():
                name = names.get(id(parameter), f"#{id(parameter)}")
                yield from _leaves((*prefix, name), entry)
        for number, group in enumerate(optimizer.param_groups):
            for key, value in group.items():
                if key not in CLOCK_KEYS:
                    yield ("group", index, number, key), value
        for path, owner, name in self.own_leaves(index):
            yield path, owner[name]

    def own_leaves(self, index: int) -> Iterator[tuple[StateKey, dict[Any, Any], Any]]:
        """What an optimizer keeps in its attributes: state key, and the dictionary and the key in it where it lies."""
        for path, owner, name in own_leaves(self.optimizers[index], self.parameter_names(), self.stepped(index)):
            yield ("own", index, *path), owner, name

    def leaves(self) -> Iterator[tuple[StateKey, Any]]:
        """Everything that a rollback restores, except the scaler."""
        yield from self.weights()
        for index in range(len(self.optimizers)):
            yield from self.optimizer_leaves(index)
        yield from self.averages()

    def averages(self) -> Iterator[tuple[StateKey, Tensor]]:
        """Averaged copies kept elsewhere."""
        for owner, tensors in self._averages().items():
            for name, tensor in tensors.items():
                yield ("average", owner, name), tensor


def describe(key: StateKey) -> str:
    """A state key in words: ``"parameter net.0.weight"``, ``"optimizer state exp_avg of net.0.weight"``."""
    match key:
        case ("optimizer", int(), str(name), *keys):
            return f"optimizer state {'.'.join(map(str, keys))} of {name}"
        case ("wrapped", int(), str(owner), str(name), *keys):
            return f"optimizer state {'.'.join(map(str, keys))} of {name} in {owner}"
        case ("group", int(index), int(number), str(name)):
            return f"{name} in group {number} of optimizer {index}"
        case ("own", int(index), *path):
            return f"{'.'.join(map(str, path))} of optimizer {index}"
        case ("average", str(owner), str(name)):
            return f"{name} in the averaged copy of {owner}"
        case (str(kind), str(name)):
            return f"{kind} {name}"
    return " ".join(map(str, key))


def _leaves(prefix: StateKey, value: Any) -> Iterator[tuple[StateKey, Any]]:
    # A list or dictionary of tensors inside (LBFGS's history) is one leaf, since its length changes.
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield (*prefix, key), item
    else:
        yield prefix, value

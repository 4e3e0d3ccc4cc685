"""The learner: everything of a run that learns, and so may be rewound, as paths to tensors and plain values.

Parameters, buffers, optimizer state (and what optimizers keep in their groups), the GradScaler's growth tracker and
averaged copies are the learner. Learning rates, schedulers and progress are the clock, which no rollback touches.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol, final

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import LBFGS, Optimizer

StateKey = tuple[Any, ...]


# Schedulers write these: they belong to the clock, and a rollback leaves them as they are.
CLOCK_KEYS = frozenset(
    {
        "params", "lr", "initial_lr", "max_lr", "min_lr", "swa_lr", "weight_decay",
        "momentum", "base_momentum", "max_momentum", "betas",
    }
)  # fmt: skip


class Scaler(Protocol):
    """What is used of a ``torch.amp.GradScaler``."""

    def state_dict(self) -> dict[str, Any]:
        """Its scale and growth tracker."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put them back."""


class Partitions(Protocol):
    """What a strategy trains in the place of the module's parameters: partitions, of which each process steps its own.

    The parameters are made from them anew after each step, and have no ``grad`` when it comes.
    """

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """By name: of each parameter what this process keeps of it, and what it steps."""

    def stepped(self) -> Mapping[str, Tensor]:
        """What the optimizer steps, by name."""

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """What the next step will use of each parameter's gradient, by the parameter's name."""

    def restored(self) -> None:
        """What :meth:`weights` gives was put back: what was made from other values goes."""


def _ready(tensor: Tensor) -> bool:
    return not isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer))


@final
class Learner:
    """The live state of a run that may be rewound, as paths to tensors and plain values.

    Args:
        module: The module trained.
        optimizers: Its optimizers.
        scaler: The GradScaler, if there is one.
        averages: Gives averaged copies of the module kept elsewhere (EMA, SWA), by name; asked anew each time, since
            such copies come and go.
        partitions: What is stepped in the parameters' place, where a strategy keeps it so.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        scaler: Scaler | None = None,
        averages: Callable[[], Mapping[str, Mapping[str, Tensor]]] = dict,
        partitions: Partitions | None = None,
    ) -> None:
        self.module = module
        self.optimizers = list(optimizers)
        # Indices of those that run their closure several times in a step, and leave and come back by themselves.
        self.quasi_newton = frozenset(i for i, one in enumerate(self.optimizers) if isinstance(one, LBFGS))
        self.scaler = scaler
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

    def statistics(self, paths: Collection[StateKey]) -> list[StateKey]:
        """Among ``paths`` running statistics of normalisation layers, and averaged copies of weights."""
        prefixes = {name for name, layer in self.module.named_modules() if isinstance(layer, _NormBase)}
        return [
            path
            for path in paths
            if (path[0] == "buffer" and path[1].rpartition(".")[0] in prefixes and "num_batches" not in path[1])
            or (path[0] == "average" and ("parameter", path[2].removeprefix("module.")) in paths)
        ]

    def lazy(self) -> bool:
        """Whether a parameter waits for the first forward to be made."""
        return any(not _ready(parameter) for parameter in self.module.parameters())

    def parameter_names(self) -> dict[int, str]:
        """Identity of every parameter to its name; tied ones keep the first."""
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        if self._partitions is not None:
            names |= {id(tensor): name for name, tensor in self._partitions.stepped().items()}
        return names

    def stepped(self, index: int) -> list[Tensor]:
        """What an optimizer steps."""
        if self._partitions is not None:
            return list(self._partitions.stepped().values())
        return [parameter for group in self.optimizers[index].param_groups for parameter in group["params"]]

    def weights_of(self, index: int) -> list[tuple[StateKey, Tensor]]:
        """Parameters that the steps of an optimizer change."""
        parameters = [(path, leaf) for path, leaf in self.weights() if path[0] == "parameter"]
        if self._partitions is not None:
            return parameters
        own = {id(parameter) for parameter in self.stepped(index)}
        return [(path, leaf) for path, leaf in parameters if id(leaf) in own]

    def gradients(self, index: int) -> list[Tensor]:
        """The gradients an optimizer steps by, as they are: sparse or sharded ones too."""
        if self._partitions is not None:
            return [gradient for _, gradient in self._partitions.gradients()]
        groups = self.optimizers[index].param_groups
        return [grad for group in groups for p in group["params"] if (grad := p.grad) is not None]

    def named_gradients(self, index: int) -> list[tuple[str, Tensor]]:
        """The same, by the parameters' names."""
        if self._partitions is not None:
            return list(self._partitions.gradients())
        names = self.parameter_names()
        found = [(names.get(id(p), "a parameter"), p.grad) for p in self.stepped(index)]
        return [(name, grad) for name, grad in found if grad is not None]

    def restored(self) -> None:
        """Weights were put back."""
        if self._partitions is not None:
            self._partitions.restored()

    def optimizer_leaves(self, index: int) -> Iterator[tuple[StateKey, Any]]:
        """State of one optimizer and what it keeps in its groups."""
        optimizer = self.optimizers[index]
        names = self.parameter_names()
        for parameter, entry in optimizer.state.items():
            name = names.get(id(parameter), f"#{id(parameter)}")
            yield from _leaves(("optimizer", index, name), entry)
        for number, group in enumerate(optimizer.param_groups):
            for key, value in group.items():
                if key not in CLOCK_KEYS:
                    yield ("group", index, number, key), value

    def leaves(self) -> Iterator[tuple[StateKey, Any]]:
        """Everything that is rewound, except the scaler."""
        yield from self.weights()
        for index in range(len(self.optimizers)):
            yield from self.optimizer_leaves(index)
        yield from self.averages()

    def averages(self) -> Iterator[tuple[StateKey, Tensor]]:
        """Averaged copies kept elsewhere."""
        for owner, tensors in self._averages().items():
            for name, tensor in tensors.items():
                yield ("average", owner, name), tensor


def describe(path: StateKey) -> str:
    """A path in words: ``"parameter net.0.weight"``, ``"optimizer state exp_avg of net.0.weight"``."""
    match path:
        case ("optimizer", int(), str(name), *keys):
            return f"optimizer state {'.'.join(map(str, keys))} of {name}"
        case ("group", int(index), int(number), str(key)):
            return f"{key} in group {number} of optimizer {index}"
        case ("average", str(owner), str(name)):
            return f"{name} in the averaged copy of {owner}"
        case (str(kind), str(name)):
            return f"{kind} {name}"
    return " ".join(map(str, path))


def _leaves(path: StateKey, value: Any) -> Iterator[tuple[StateKey, Any]]:
    # Lists and dictionaries of tensors (LBFGS's history) are taken whole, since their length changes.
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield (*path, key), item
    else:
        yield path, value

"""The learner: the part of a run's state that a rollback restores, as state keys and leaves.

The learner consists of parameters, buffers, optimizer state (with what optimizers keep in their groups), the growth
tracker of the GradScaler and averaged copies. Learning rates, schedulers and counters are the clock, which no rollback
changes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Protocol, final

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import LBFGS, Optimizer

from lightning_nanguard.measure.batches import nested_tensors
from lightning_nanguard.measure.tensors import is_strided, local
from lightning_nanguard.state.device import Device

StateKey = tuple[Any, ...]
"""Names one leaf of the learner: ``("parameter", name)``, ``("buffer", name)``, ``("average", owner, name)``,
``("optimizer", index, parameter name, key)`` or ``("group", index, group number, key)``. The state of an optimizer that
another one wraps is ``("wrapped", index, attribute, parameter name, key)``. Values in an optimizer's own attributes are
``("own", index, attribute)`` and ``("own", index, attribute, key)``."""


def unwrapped(name: str) -> str:
    """The name of a tensor without the prefix of a wrapper: AveragedModel and DDP hold their module as ``module``."""
    return name.removeprefix("module.")


# Schedulers write these keys of parameter groups, so they belong to the clock.
CLOCK_KEYS = frozenset(
    {
        "params", "lr", "initial_lr", "max_lr", "min_lr", "swa_lr", "weight_decay",
        "momentum", "base_momentum", "max_momentum", "betas",
    }
)  # fmt: skip
_SCHEDULED = tuple(sorted(CLOCK_KEYS - {"params"}))


def scheduled_values(groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What a scheduler may have written into each of some parameter groups."""
    return [{key: group[key] for key in _SCHEDULED if key in group} for group in groups]


def give_scheduled(groups: Iterable[dict[str, Any]], values: Iterable[Mapping[str, Any]]) -> None:
    """Write values of :func:`scheduled_values` into as many parameter groups."""
    for group, known in zip(groups, values, strict=True):
        group.update(known)


class Partitions(Protocol):
    """Partitions that a strategy trains in place of the module's parameters. Each rank steps its own.

    After each step the strategy makes the parameters from them. The parameters have no ``grad`` before a step.
    """

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors: this rank's part of each parameter, and the tensors that its optimizer steps."""

    def stepped(self) -> Mapping[str, Tensor]:
        """The tensors that the optimizer steps, by name."""

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's part of each gradient that the next step will use, with the name of the parameter."""

    def restored(self) -> None:
        """Drop tensors that were made from the old values, because the tensors of :meth:`weights` were restored."""


def states_of(optimizer: Optimizer, index: int) -> Iterator[tuple[StateKey, MutableMapping[Any, Any]]]:
    """The state that an optimizer, and each optimizer inside it, keeps of its parameters: start of its keys, and state.

    Optimizers such as SAM or Lookahead hold another optimizer as an attribute, and this one has the moments.
    """
    yield ("optimizer", index), optimizer.state
    for name, inner in getattr(optimizer, "__dict__", {}).items():
        if isinstance(inner, Optimizer) and inner.state is not optimizer.state:
            yield ("wrapped", index, name), inner.state


def _ready(tensor: Tensor) -> bool:
    return not isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer))


@final
class Learner:
    """Gives the live state of a run that a rollback restores, as state keys and leaves (tensors and plain values).

    Args:
        module: The module trained.
        optimizers: Its optimizers.
        scaler: The GradScaler, if there is one.
        averages: Gives averaged copies of the module that are kept elsewhere (EMA, SWA), by name. It is called each
            time, because such copies come and go.
        partitions: The partitions that are stepped in place of the parameters, if the strategy has any.
        device: The device of the run.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[Optimizer],
        scaler: GradScaler | None = None,
        averages: Callable[[], Mapping[str, Mapping[str, Tensor]]] = dict,
        partitions: Partitions | None = None,
        device: Device | None = None,
    ) -> None:
        self.module = module
        self.optimizers = list(optimizers)
        # Indices of optimizers that evaluate their closure several times in one step, as in a line search.
        self.quasi_newton = frozenset(i for i, one in enumerate(self.optimizers) if isinstance(one, LBFGS))
        self.scaler = scaler
        self.device = Device() if device is None else device
        self._averages = averages
        self._partitions = partitions
        self._frozen = frozenset(id(one) for one in module.parameters() if not one.requires_grad)

    @property
    def is_plain(self) -> bool:
        """Whether an update is one step of one optimizer, with one evaluation of its closure and no GradScaler."""
        return len(self.optimizers) == 1 and not self.quasi_newton and self.scaler is None

    def weights(self) -> Iterator[tuple[StateKey, Tensor]]:
        """Parameters, and buffers including those that are not persistent."""
        own = self._partitions
        for name, parameter in self.module.named_parameters() if own is None else own.weights():
            if _ready(parameter):
                yield ("parameter", name), parameter
        for name, buffer in self.module.named_buffers():
            if _ready(buffer):
                yield ("buffer", name), buffer

    def statistics(self, keys: Collection[StateKey]) -> list[StateKey]:
        """The keys among ``keys`` of running statistics of normalisation layers, and of averaged copies."""
        prefixes = {name for name, layer in self.module.named_modules() if isinstance(layer, _NormBase)}

        def counts(name: str) -> bool:
            return name.rpartition(".")[0] in prefixes and "num_batches" not in name

        return [
            key
            for key in keys
            if (key[0] == "buffer" and counts(key[1]))
            or (key[0] == "average" and (("parameter", name := unwrapped(key[2])) in keys or counts(name)))
        ]

    def idle_statistics(self, before: Mapping[StateKey, Any]) -> set[StateKey]:
        """State keys of running statistics from which no update since an earlier state was made.

        Layers that have updated them since then normalise by the batch, and use them only in evaluation.

        Args:
            before: The leaves of the earlier state.
        """
        found: set[StateKey] = set()
        for name, layer in self.module.named_modules():
            if isinstance(layer, _NormBase) and type(layer).__module__.startswith("torch.nn."):
                prefix, now = f"{name}." if name else "", layer.num_batches_tracked
                then = before.get(("buffer", f"{prefix}num_batches_tracked"))
                if now is not None and isinstance(then, Tensor) and int(now) != int(then):
                    found |= {("buffer", f"{prefix}{one}") for one in ("running_mean", "running_var")}
        return found

    def untrained(self) -> dict[StateKey, StateKey]:
        """The parameters that no optimizer trains, such as a frozen average, each with the part that it belongs to.

        A part is the largest submodule without a trained parameter. A parameter that an optimizer holds counts only if
        it has been frozen since the start and has no optimizer state, because a parameter may be frozen for one step.
        """
        if self._partitions is not None:
            return {}
        states = [state for index, one in enumerate(self.optimizers) for _, state in states_of(one, index)]
        held = {id(parameter) for index in range(len(self.optimizers)) for parameter in self.stepped(index)}
        named = dict(self.module.named_parameters())
        copies = held - {id(parameter) for parameter in named.values()}  # may be stepped in place of the parameters
        free = [
            name
            for name, one in named.items()
            if (one.grad is None and id(one) not in held and not copies)
            or (id(one) in self._frozen and not one.requires_grad and not any(_holds(state, one) for state in states))
        ]
        busy = {prefix for name in named.keys() - set(free) for prefix in _prefixes(name)}
        return {
            ("parameter", name): ("untrained", next((one for one in _prefixes(name) if one not in busy), name))
            for name in free
        }

    def copies(self, part: str, untrained: Mapping[StateKey, StateKey]) -> dict[StateKey, StateKey]:
        """The parameters of an untrained part, each with the weight that it may be a copy of.

        It is empty if no trained part has parameters of the same names and shapes.

        Args:
            part: Name of the part.
            untrained: The result of :meth:`untrained`.
        """
        named = dict(self.module.named_parameters())
        trained = {n: one.shape for n, one in named.items() if _ready(one) and ("parameter", n) not in untrained}
        names = [key[1] for key, its in untrained.items() if its[1] == part != key[1]]
        # A wrapper may hold the copy, as AveragedModel does.
        inside = [level for level in zip(*(_prefixes(name)[:-1] for name in names), strict=False) if len({*level}) == 1]
        start = f"{inside[-1][0]}." if inside else ""
        own = {name.removeprefix(start): named[name].shape for name in names}
        first = next(iter(own), "")
        for name in trained if own else ():
            prefix = name.removesuffix(first)
            if f"{prefix}{first}" == name and all(trained.get(prefix + one) == shape for one, shape in own.items()):
                return {("parameter", start + one): ("parameter", prefix + one) for one in own}
        return {}

    def lazy(self) -> bool:
        """Whether a parameter is uninitialised until the first forward pass."""
        return any(not _ready(parameter) for parameter in self.module.parameters())

    def parameter_names(self) -> dict[int, str]:
        """The name of every parameter by its identity. Tied parameters have their first name."""
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
        """For each tensor that an optimizer steps, whether it has a gradient; ``None`` if all of them have one.

        Args:
            index: Index of the optimizer.
            found: Number of gradients. If all tensors have one, the tensors are not inspected.
        """
        groups = self.optimizers[index].param_groups
        if self._partitions is not None or found == sum(len(group["params"]) for group in groups):
            return None
        return tuple(p.grad is not None for group in groups for p in group["params"])

    def named_sizes(self, index: int) -> list[tuple[str, int]]:
        """Names and element counts of the tensors that an optimizer steps; of a sharded tensor, this rank's part."""
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
        """The gradients that an optimizer uses, unchanged: also sparse or sharded ones."""
        if self._partitions is not None:
            return [gradient for _, gradient in self._partitions.gradients()]
        groups = self.optimizers[index].param_groups
        return [grad for group in groups for p in group["params"] if (grad := p.grad) is not None]

    def named_gradients(self, index: int) -> list[tuple[str, Tensor]]:
        """The gradients that an optimizer uses, with the names of the parameters."""
        if self._partitions is not None:
            return list(self._partitions.gradients())
        names = self.parameter_names()
        found = [(names.get(id(p), "a parameter"), p.grad) for p in self.stepped(index)]
        return [(name, grad) for name, grad in found if grad is not None]

    def restored(self) -> None:
        """Note that weights were restored. A strategy then makes the tensors again that it has made from them."""
        if self._partitions is not None:
            self._partitions.restored()

    def optimizer_leaves(self, index: int) -> Iterator[tuple[StateKey, Any]]:
        """State of one optimizer, and the values that it keeps in its groups."""
        optimizer = self.optimizers[index]
        names = self.parameter_names()
        for prefix, state in states_of(optimizer, index):
            for parameter, entry in state.items():
                yield from _leaves((*prefix, name_in_keys(names, parameter)), entry)
        for number, group in enumerate(optimizer.param_groups):
            for key, value in group.items():
                if key not in CLOCK_KEYS:
                    yield ("group", index, number, key), value
        for path, owner, name in self.own_leaves(index, names):
            yield path, owner[name]

    def own_leaves(self, index: int, names: Mapping[int, str]) -> Iterator[tuple[StateKey, dict[Any, Any], Any]]:
        """The values in an optimizer's own attributes: state key, the dictionary of the value, and the key there.

        Args:
            index: Index of the optimizer.
            names: The names of :meth:`parameter_names`.
        """
        for path, owner, name in _own_leaves(self.optimizers[index], names, self.stepped(index)):
            yield ("own", index, *path), owner, name

    def leaves(self) -> Iterator[tuple[StateKey, Any]]:
        """Everything that a rollback restores, except the GradScaler."""
        yield from self.weights()
        for index in range(len(self.optimizers)):
            yield from self.optimizer_leaves(index)
        yield from self.averages()

    def held_weights(self) -> list[Any]:
        """The objects that :meth:`weights` goes through, without names, which takes a tenth of the time.

        As long as they are the same, so are the weights.
        """
        if self._partitions is not None:
            return [leaf for _, leaf in self.weights()]
        return [
            held
            for module in self.module.modules()
            for part in (module._parameters, module._buffers)
            for held in part.values()
        ]

    def held(self) -> list[Any]:
        """The objects that :meth:`leaves` goes through, without names.

        As long as they are the same, so are the leaves.
        """
        found = self.held_weights()
        for index, optimizer in enumerate(self.optimizers):
            for _, state in states_of(optimizer, index):
                for entry in state.values():
                    found += entry.values() if isinstance(entry, Mapping) else (entry,)
            for group in optimizer.param_groups:
                found += [value for key, value in group.items() if key not in CLOCK_KEYS]
            found += [owner[name] for _, owner, name in _own_leaves(optimizer, {}, self.stepped(index))]
        return found + [tensor for tensors in self._averages().values() for tensor in tensors.values()]

    def averages(self) -> Iterator[tuple[StateKey, Tensor]]:
        """The averaged copies that are kept elsewhere."""
        for owner, tensors in self._averages().items():
            for name, tensor in tensors.items():
                yield ("average", owner, name), tensor


def name_in_keys(names: Mapping[int, str], parameter: Tensor) -> str:
    """The name of a parameter in state keys. One that the module does not have is named by its identity.

    Args:
        names: The names of :meth:`Learner.parameter_names`.
        parameter: The parameter.
    """
    return names.get(id(parameter), f"#{id(parameter)}")


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


def _holds(state: Mapping[Any, Any], parameter: Tensor) -> bool:
    """Whether an optimizer has made state for a parameter."""
    entry = state.get(parameter)
    return entry is not None and not (isinstance(entry, Mapping) and not entry)


def _prefixes(name: str) -> list[str]:
    """The names of the modules that hold a parameter, the outermost first, and its own name."""
    parts = name.split(".")
    return [".".join(parts[: number + 1]) for number in range(len(parts))]


def _leaves(prefix: StateKey, value: Any) -> Iterator[tuple[StateKey, Any]]:
    # A list or dictionary of tensors inside (the history of LBFGS) is one leaf, because its length changes.
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield (*prefix, key), item
    else:
        yield prefix, value


_NOT_OWN = frozenset({"state", "param_groups", "defaults"})


def _own_leaves(
    optimizer: Optimizer, names: Mapping[int, str], stepped: Iterable[Tensor]
) -> Iterator[tuple[tuple[Any, ...], dict[Any, Any], Any]]:
    """The tensors, lists of tensors and numbers among an optimizer's own attributes.

    The values of dictionaries are given one by one. The weights, and tensors that share memory with them, are left out.

    Args:
        optimizer: The optimizer. Those of torch keep everything in ``state``.
        names: Names of parameters by identity, for dictionaries whose keys are parameters.
        stepped: The tensors that the optimizer steps.

    Yields:
        The path, the dictionary that holds the value, and its key there. The path is the name of the attribute,
        followed by the key in it, or by the name of the parameter that is the key.
    """
    if type(optimizer).__module__.startswith("torch.optim"):
        return
    attributes, weights = vars(optimizer), _memory_of(stepped)
    for name, value in list(attributes.items()):
        if name in _NOT_OWN:
            continue
        if type(value) is dict:
            for key, entry in list(value.items()):
                if _holds_state(entry, weights):
                    yield (name, names.get(id(key), key)), value, key
        elif _holds_state(value, weights) or (type(value) in (int, float) and not name.startswith("_")):
            yield (name,), attributes, name


def _memory_of(tensors: Iterable[Tensor]) -> frozenset[int]:
    plain = (local(one) for one in tensors if _ready(one))
    return frozenset(one.untyped_storage().data_ptr() for one in plain if is_strided(one))


def _holds_state(value: Any, weights: frozenset[int]) -> bool:
    if not (isinstance(value, Tensor) or type(value) in (list, tuple, dict)):
        return False
    tensors = list(nested_tensors(value))
    return bool(tensors) and weights.isdisjoint(_memory_of(tensors))

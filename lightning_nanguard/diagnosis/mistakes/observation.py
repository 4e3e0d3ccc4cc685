"""The :class:`Observation` of the first updates of a run, in plain numbers and strings."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from lightning_nanguard.types import Finding


@dataclass(frozen=True, slots=True)
class ParameterSeen:
    """Observations of one parameter in the first updates.

    Attributes:
        name: Its name, ``"net.0.weight"``.
        trainable: Whether it required a gradient at any time.
        optimized: Whether it is in an optimizer.
        gradient: Whether it ever got a gradient.
        ran: Whether the module that has it was run in one of the first batches.
        graph: Whether an output of this module required a gradient.
        cut: Whether another part got the output of this module without its graph.
        untrained: Whether it looks untrained; ``None`` if this was not checked or is not known.
        copy: Whether its part has the same weights as a trained part, so that it may be an average or target network.
        moved: Whether it has changed; ``None`` if this was not checked.
    """

    name: str
    trainable: bool = True
    optimized: bool = True
    gradient: bool = True
    ran: bool = True
    graph: bool = True
    cut: bool = False
    untrained: bool | None = None
    copy: bool = False
    moved: bool | None = None

    @property
    def trained(self) -> bool:
        """Whether it is trained."""
        return self.trainable and self.optimized and self.gradient


@dataclass(frozen=True, slots=True)
class ModeSeen:
    """The mode of a module, such as dropout, that behaves differently in training and in evaluation.

    Attributes:
        path: Its path.
        kind: Name of its class.
        drops: Whether it drops numbers at random.
        training: Whether it was in training mode in any checked update except the very first ones.
        within: Path of the outermost module around it that was in evaluation mode in each of these updates. Its own
            path if the modules around it were in training mode.
    """

    path: str
    kind: str
    drops: bool
    training: bool
    within: str = ""


@dataclass(frozen=True, slots=True)
class RateSeen:
    """The scheduled learning rate of one parameter group.

    Attributes:
        optimizer: Index of the optimizer.
        group: Index of the group.
        highest: Highest rate.
        last: Last rate.
        rose: Whether it rose after it had fallen below its last value.
        moved: Whether a parameter of the group has changed; ``None`` if this was not checked.
    """

    optimizer: int
    group: int
    highest: float
    last: float
    rose: bool = False
    moved: bool | None = None


@dataclass(frozen=True, slots=True)
class Observation:
    """The observations of the first updates of a run.

    Attributes:
        updates: Number of observed updates.
        parameters: Every parameter of the model.
        modes: Modules that behave differently in training and in evaluation.
        evaluating: Whether the trained module itself was in evaluation mode in every checked update.
        rates: The learning rate of each parameter group.
        expected: Planned number of updates of the run; infinite if it is not known.
        scheduled: Whether a scheduler changes the rates.
        since: Updates after the observed ones in which the rates were observed further.
        losses: Number of checked losses, up to the first one that depends on a trained parameter.
        graphless: The same number if none of them depends on a trained parameter; else 0.
        added: Largest number of updates in a row, over all optimizers, whose gradients were added to the ones before.
        batches: Number of compared batches of one epoch; 0 if one field showed that they differ.
        distinct: Number of different ones among them.
        unfreezes: Whether a callback unfreezes parts during the run.
    """

    updates: int
    parameters: tuple[ParameterSeen, ...] = ()
    modes: tuple[ModeSeen, ...] = ()
    evaluating: bool = False
    rates: tuple[RateSeen, ...] = ()
    expected: float = math.inf
    scheduled: bool = False
    since: int = 0
    losses: int = 0
    graphless: int = 0
    added: int = 0
    batches: int = 0
    distinct: int = 0
    unfreezes: bool = False

    def finding(self, cause: str, confidence: float, place: str, suggestion: str, **numbers: float) -> Finding:
        """A finding about these updates, with some numbers and that of the updates as evidence."""
        evidence = {name: float(number) for name, number in numbers.items()} | {"updates": float(self.updates)}
        return Finding(cause, confidence, evidence, place, suggestion=suggestion)

    def parts(self, chosen: Callable[[ParameterSeen], bool]) -> tuple[str, ...]:
        """The largest parts of the model in which every parameter is ``chosen``, in the order of the model."""
        found = {one.name for one in self.parameters if chosen(one)}
        return largest_parts([one.name for one in self.parameters], found) if found else ()


def largest_parts(names: Sequence[str], chosen: Collection[str]) -> tuple[str, ...]:
    """The shortest paths below which every name is chosen, in order.

    Example:
        >>> largest_parts(["a.0.w", "a.0.b", "a.1.w", "b.w"], {"a.0.w", "a.0.b", "b.w"})
        ('a.0', 'b')
    """
    left_out: set[str] = set()
    for name in names:
        if name not in chosen:
            left_out.update(prefixes(name))
    found: dict[str, None] = {}
    for name in names:
        if name in chosen:
            found[next(path for path in prefixes(name) if path not in left_out)] = None
    return tuple(found)


def prefixes(name: str) -> Iterable[str]:
    """All prefixes of a path, such as ``a``, ``a.0`` and ``a.0.w``."""
    words = name.split(".")
    return (".".join(words[: count + 1]) for count in range(len(words)))

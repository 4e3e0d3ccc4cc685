"""What the first updates of a run have shown: an :class:`Observation`, in plain numbers and words."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ParameterSeen:
    """One parameter over the first updates.

    Attributes:
        name: Its name, ``"net.0.weight"``.
        trainable: Whether it required a gradient at any time.
        optimized: Whether an optimizer has it.
        gradient: Whether it ever got a gradient.
        ran: Whether the module that owns it was run in one of the first batches.
        graph: Whether something that this module gave required a gradient then.
        cut: Whether another part was given what this module gave, without its graph.
        untrained: Whether it looks as if it were just initialised; ``None`` if that was not looked at or cannot be
            told.
        copy: Whether a part with weights of the same shapes is trained, so that this may be an average or a target of
            it.
        moved: Whether it has changed; ``None`` if that was not looked at.
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
    def owner(self) -> str:
        """Path of the module that owns it."""
        return self.name.rpartition(".")[0]

    @property
    def trained(self) -> bool:
        """Whether it is trained."""
        return self.trainable and self.optimized and self.gradient


@dataclass(frozen=True, slots=True)
class ModeSeen:
    """A module that computes something else in training than in evaluation, while batches were trained on.

    Attributes:
        path: Its path.
        kind: Name of its class.
        drops: Whether it drops numbers at random.
        training: Whether it was in training mode in any update looked at, but for the very first ones.
        within: Path of the outermost module around it that was in evaluation mode in each of them; its own path where
            those around it were in training mode.
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
    """

    optimizer: int
    group: int
    highest: float
    last: float
    rose: bool = False


@dataclass(frozen=True, slots=True)
class Observation:
    """What the first updates of a run have shown.

    Attributes:
        updates: Updates that were looked at.
        parameters: Every parameter of the model.
        modes: Modules that compute something else in training than in evaluation.
        evaluating: Whether the module that is trained was itself in evaluation mode in every update looked at.
        rates: Of each parameter group.
        expected: Updates that the run is to have in all; infinite where that is not known.
        scheduled: Whether a scheduler changes the rates.
        losses: Losses that were looked at: all up to the first one that depends on something trained.
        graphless: As many, where none of them does; else 0.
        added: Updates in a row whose gradients were added to those of the update before, the most of all optimizers.
        batches: Batches of one epoch that were compared.
        distinct: How many different ones they were.
        unfreezes: Whether a callback unfreezes parts in the course of the run.
    """

    updates: int
    parameters: tuple[ParameterSeen, ...] = ()
    modes: tuple[ModeSeen, ...] = ()
    evaluating: bool = False
    rates: tuple[RateSeen, ...] = ()
    expected: float = math.inf
    scheduled: bool = False
    losses: int = 0
    graphless: int = 0
    added: int = 0
    batches: int = 0
    distinct: int = 0
    unfreezes: bool = False

    def parts(self, chosen: Callable[[ParameterSeen], bool]) -> tuple[str, ...]:
        """The largest parts of the model all of whose parameters are ``chosen``, in the order of the model."""
        found = {one.name for one in self.parameters if chosen(one)}
        return largest_parts([one.name for one in self.parameters], found) if found else ()


def largest_parts(names: Sequence[str], chosen: Collection[str]) -> tuple[str, ...]:
    """The shortest paths under which every name is chosen, in order.

    Example:
        >>> largest_parts(["a.0.w", "a.0.b", "a.1.w", "b.w"], {"a.0.w", "a.0.b", "b.w"})
        ('a.0', 'b')
    """
    left_out: set[str] = set()
    for name in names:
        if name not in chosen:
            left_out.update(_prefixes(name))
    found: dict[str, None] = {}
    for name in names:
        if name in chosen:
            found[next(path for path in _prefixes(name) if path not in left_out)] = None
    return tuple(found)


def _prefixes(name: str) -> Iterable[str]:
    """``a``, ``a.0``, ``a.0.w``."""
    words = name.split(".")
    return (".".join(words[: count + 1]) for count in range(len(words)))


def named(parts: Sequence[str], most: int) -> str:
    """``body and neck``, ``body, neck and 3 more``.

    Example:
        >>> named(["body", "neck"], 4)
        'body and neck'
    """
    if len(parts) > most:
        return f"{', '.join(parts[:most])} and {len(parts) - most} more"
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else "".join(parts)

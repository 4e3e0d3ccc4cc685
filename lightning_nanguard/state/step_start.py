"""Stores everything that a training step begins from, so that the same step can be made again."""

from __future__ import annotations

import logging
from typing import Any, final

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_nanguard.measure.batches import nested_tensors
from lightning_nanguard.state.attribute_memory import AttributeMemory, Attributes
from lightning_nanguard.state.batch_contents import BatchContents
from lightning_nanguard.state.random_state import RandomState, is_checked
from lightning_nanguard.thresholds.batches import RepeatedStepsThresholds

_logger = logging.getLogger("lightning_nanguard")


@final
class StepClock:
    """Random streams and counters after a step. They are not rewound if the step is left out.

    Args:
        random: The random streams.
        counters: Numbers, strings and flags among the module's attributes that the step has changed: the dictionary
            that holds each, its name and its value.
    """

    __slots__ = ("_counters", "_random")

    def __init__(self, random: RandomState, counters: list[tuple[dict[str, Any], str, Any]]) -> None:
        self._random = random
        self._counters = counters

    @property
    def counted(self) -> bool:
        """Whether the step has changed a counter."""
        return bool(self._counters)

    @property
    def names(self) -> list[str]:
        """The names of the counters."""
        return [name for _, name, _ in self._counters]

    def restore(self) -> None:
        """Set random streams and counters to their values after the step."""
        self._random.restore()
        self.restore_counters()

    def restore_counters(self) -> None:
        """Set the counters to their values after the step."""
        for attributes, name, value in self._counters:
            attributes[name] = value


@final
class StepStart:
    """What one step began from, except weights and buffers.

    Args:
        random: The random streams.
        attributes: The module's plain attributes.
        batch: The batch. Steps may remove entries from its dictionaries and lists.
        depth: Levels of its nested containers that are stored.

    Attributes:
        attributes: The module's plain attributes.
    """

    __slots__ = ("_contents", "_depth", "_random", "attributes")

    def __init__(self, random: RandomState, attributes: Attributes, batch: Any, depth: int) -> None:
        self._random = random
        self.attributes = attributes
        self._depth = depth
        self._contents = BatchContents(batch, depth)

    def restore(self, *, carried: bool = True) -> None:
        """Restore random streams, the containers of the batch, and the module's attributes.

        Args:
            carried: Whether to restore all attributes, and not only numbers, strings and flags. The others carry values
                from step to step, and a bad step may have changed them.
        """
        self.restore_batch()
        (self.attributes.restore if carried else self.attributes.restore_plain)()
        self._random.restore()

    def restore_batch(self) -> None:
        """Restore the containers of the batch only."""
        self._contents.restore()

    def use(self, part: Any) -> None:
        """Restore from now on the containers of a part of the batch, too, because only this part is run."""
        self._contents.add(part, self._depth)

    def carried_back(self) -> None:
        """Restore the attributes that a skipped batch may have made bad: all but numbers, strings and flags.

        Numbers, strings and flags count steps, and belong to the clock.
        """
        self.attributes.restore(plain=False)

    def emptied(self) -> StepStart:
        """A copy without the batch and the attributes, whose tensors may be large."""
        return StepStart(self._random, Attributes(()), None, 0)

    def clock_now(self) -> StepClock:
        """The present state of random streams and counters, which belong to the clock."""
        return StepClock(self._random.now(), self.attributes.plain_now())


@final
class StepMemory:
    """Stores before every step what it begins from, and finds steps that cannot be made again.

    A step that writes into its batch or into parameters would not be the same a second time. The first steps are
    checked for this, and some of the later ones.

    Args:
        module: The module trained.
        thresholds: Which steps are checked, and what is copied.

    Attributes:
        repeatable: Whether steps can be made again, as far as is known.
        writes_weights: Whether a step was seen to write into parameters.
    """

    def __init__(self, module: nn.Module, thresholds: RepeatedStepsThresholds = RepeatedStepsThresholds()) -> None:
        self._module = module
        self._limits = thresholds
        self._attributes = AttributeMemory(module, thresholds)
        self._opened = 0
        self._written: list[tuple[Any, int]] = []
        self.repeatable = True
        self.writes_weights = False

    def attributes_now(self) -> Attributes:
        """The module's attributes as they are now."""
        return self._attributes.now()

    def open(self, batch: Any, random: RandomState) -> StepStart:
        """Store what the next step begins from."""
        limits, count = self._limits, self._opened
        self._opened += 1
        checked = is_checked(count, limits.checked_every)
        if checked:
            tensors = [*nested_tensors(batch), *self._module.parameters()]
            self._written = [(tensor, tensor._version) for tensor in tensors if _has_version(tensor)]
        return StepStart(random, self._attributes.open(checked=checked), batch, limits.depth)

    def close(self) -> None:
        """After forward and backward, note what they changed, if this step is a checked one."""
        self._attributes.close()
        written, self._written = self._written, []
        changed = [tensor for tensor, version in written if tensor._version != version]
        self.writes_weights |= any(isinstance(tensor, nn.Parameter) for tensor in changed)
        if self.repeatable and changed:
            self.repeatable = False
            _logger.debug("NaNGuard: training_step changes its batch or parameters, so no step is made again.")


def _has_version(tensor: Tensor) -> bool:
    return not (is_lazy(tensor) or tensor.is_inference())

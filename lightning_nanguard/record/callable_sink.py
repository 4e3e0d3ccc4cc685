"""A sink that calls a function, and the check of the argument ``sinks``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, final

from lightning_nanguard.errors import takes_one_argument
from lightning_nanguard.record.base import Sink
from lightning_nanguard.types import Intervention

_NAME = "NaNGuard(sinks="


@final
class CallableSink(Sink):
    """Calls a function with each intervention.

    Args:
        function: Called with the intervention. Its return value is not used.
        every_rank: Whether it is called on every rank instead of on rank 0 only.

    Example:
        >>> CallableSink(lambda intervention: print(intervention.fault)).write(
        ...     Intervention(7, 0, 7, "non_finite_loss", "loss", ("skip",), 0.1, 0.1)
        ... )
        non_finite_loss
    """

    def __init__(self, function: Callable[[Intervention], Any], *, every_rank: bool = False) -> None:
        self.function = function
        self.every_rank = every_rank

    def write(self, intervention: Intervention) -> None:
        """Call the function."""
        self.function(intervention)


def as_sinks(given: object) -> tuple[Sink, ...]:
    """Check the sinks that were given to ``NaNGuard``, and wrap functions among them. ``None`` means no sinks.

    Raises:
        TypeError: If it is not a list, or holds an object that is neither a sink nor a function of one argument.
        ValueError: If a sink's timeout is out of its range.
    """
    if given is None:
        return ()
    if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
        raise TypeError(
            f"{_NAME}{given!r}): expected a list of Sink instances or functions; write sinks=[…] around it."
        )
    return tuple(map(_as_sink, given))


def _as_sink(item: object) -> Sink:
    where = f"{_NAME}…): "
    if isinstance(item, type):
        raise TypeError(f"{where}{item!r} is not an instance of Sink; write {item.__name__}().")
    if isinstance(item, Sink):
        timeout = item.timeout
        number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
        if timeout is not None and not (number and 0 < timeout <= threading.TIMEOUT_MAX):
            raise ValueError(
                f"{where}{type(item).__name__} has timeout={timeout!r}: expected a number of seconds above 0, or None."
            )
        return item
    if not callable(item):
        raise TypeError(f"{where}{item!r} is neither an instance of Sink nor a function.")
    if not takes_one_argument(item):
        raise TypeError(f"{where}{item!r} cannot be called with one argument, the Intervention.")
    return CallableSink(item)

"""The base class of sinks, and the facts about a fit that a sink gets.

Your own sink is a class with the method :meth:`Sink.write`, or any function that takes one intervention::

    class Beep(Sink):
        def write(self, intervention):
            print("beep", intervention.fault)

    NaNGuard(sinks=[Beep(), print])

In the YAML file of a LightningCLI, name a sink (or a callable object) by its class path, with or without arguments.
Name a function by its path::

    sinks:
      - class_path: my.Beep
        init_args: {times: 2}
      - my.function

A guard can be copied and pickled between fits if its sinks can.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from lightning_nanguard.errors import takes_one_argument
from lightning_nanguard.types import Intervention


@final
@dataclass(frozen=True, slots=True)
class RunInfo:
    """Tells a sink about the fit that begins.

    Attributes:
        rank: Rank of this process; 0 with one process.
        world_size: Number of processes.
        dirpath: Folder of the guard's records in this run. It may not exist yet.
        run_id: Id of the run. A resumed run keeps the id of the run that it continues.
    """

    rank: int = 0
    world_size: int = 1
    dirpath: Path = Path("nanguard")
    run_id: str = ""


class Sink(ABC):
    """Receives one record for each intervention, to store, show or send it. Subclass it to write your own sink.

    In each fit the guard opens a sink once, gives it every record, and closes it once. The same sink may be used in
    several fits. If a sink raises, the exception is logged the first time, with the name of the sink, and the run and
    the other sinks go on. Each record is on disk (``interventions.jsonl``) before your sinks get it.

    All ranks make the same interventions, so by default a sink is used on rank 0 only.

    Attributes:
        every_rank: Whether the sink is used on every rank, each with its own copy, instead of on rank 0 only. Set it in
            the class or in ``__init__``.
        timeout: ``None``: the sink is called directly, and training waits for it. A number of seconds, for a slow sink
            (mail, network): it is called from a separate thread, where at most 100 records wait. If there are more, the
            oldest is dropped and counted. At the end of the fit the sink has this many seconds to write the waiting
            records and to close. The number of records that it did not write is logged. A call that takes longer is not
            interrupted, but the fit ends without it, and ``close`` is not called.

    Example:
        >>> class Beep(Sink):
        ...     def write(self, intervention):
        ...         print("beep", intervention.fault)
        >>> Beep().write(Intervention(7, 0, 7, "non_finite_loss", "loss", ("skip",), 0.1, 0.1))
        beep non_finite_loss
    """

    every_rank: bool = False
    timeout: float | None = None

    def open(self, run: RunInfo) -> None:  # noqa: B027
        """Prepare for a fit, before its first update. The default does nothing.

        Args:
            run: Facts about the fit.
        """

    @abstractmethod
    def write(self, intervention: Intervention) -> None:
        """Receive one record. Without a :attr:`timeout` training waits until this returns."""

    def close(self) -> None:  # noqa: B027
        """The fit is over. Another may follow. The default does nothing."""


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

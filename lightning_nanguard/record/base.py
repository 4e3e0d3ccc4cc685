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

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import final

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

"""The base class of sinks, and what a sink may know of a fit.

A sink of your own is one class with a :meth:`Sink.write`, or any function that takes one intervention::

    class Beep(Sink):
        def write(self, intervention):
            print("beep", intervention.fault)

    NaNGuard(sinks=[Beep(), print])

In the YAML file of a LightningCLI give a sink, or an object that can be called, by its class path, with or without
arguments; give a function by its path::

    sinks:
      - class_path: my.Beep
        init_args: {times: 2}
      - my.function

A guard can be copied and pickled between fits as far as its sinks can.
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
    """What a sink may need to know of the fit that begins.

    Attributes:
        rank: Rank of this process; 0 with one process.
        world_size: Number of processes.
        dirpath: Folder of the guard's records in this run. Where nothing can be written yet it does not exist.
        run_id: Id of the run, which a resumed run has from the run it goes on with.
    """

    rank: int = 0
    world_size: int = 1
    dirpath: Path = Path("nanguard")
    run_id: str = ""


class Sink(ABC):
    """Something that keeps or shows interventions. Subclass it to send them where you want them.

    In each fit a sink is opened once, given every record and closed once; the same sink may serve several fits. What it
    raises is logged the first time, with its name, and costs neither the run nor the other sinks. A record is on disk
    (``interventions.jsonl``) before a sink of the user's is given it.

    All ranks make the same interventions, so by default a sink is used on rank 0 only.

    Attributes:
        every_rank: Whether the sink is used on every rank, each with its own copy, instead of on rank 0 only. Set it in
            the class or in ``__init__``.
        timeout: ``None`` for a sink that is called at once, while training waits. A number of seconds for a slow one
            (mail, network): it is called from a thread of its own, where at most 100 records wait. When one more comes
            the oldest is dropped and counted. At the end of the fit it has this many seconds to write what waits and to
            close; how many records it did not write is logged. A call that takes longer still is not interrupted, but
            nobody waits for it, and ``close`` is not called then.

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
        """Get ready for a fit, before its first update. The default does nothing.

        Args:
            run: What may be needed to know of the fit.
        """

    @abstractmethod
    def write(self, intervention: Intervention) -> None:
        """Take one record. Without a :attr:`timeout` training goes on only after this returns."""

    def close(self) -> None:  # noqa: B027
        """The fit is over. Another may follow. The default does nothing."""

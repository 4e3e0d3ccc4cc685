"""A sink that logs the numbers of the run to experiment loggers after each intervention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, final

from lightning_nanguard.record.base import Sink
from lightning_nanguard.types import Intervention


class RunNumbers(NamedTuple):
    """The numbers of a guarded run that are logged as ``nanguard/NAME``; ``None`` is not logged.

    Attributes:
        interventions: Number of all interventions so far.
        lr_multiplier: Factor on the scheduled learning rates.
        clip_val: The clipping value that the guard has turned on.
    """

    interventions: int
    lr_multiplier: float
    clip_val: float | None = None


@final
class Loggers(Sink):
    """Logs the numbers of the run after each intervention.

    Args:
        numbers: Returns the present numbers.
        log: Logs some values by name.

    Example:
        >>> sink = Loggers(lambda: RunNumbers(1, 0.5), print)
        >>> sink.write(Intervention(7, 0, 7, "non_finite_loss", "loss", ("skip",), 0.1, 0.1))
        {'nanguard/interventions': 1.0, 'nanguard/lr_multiplier': 0.5}
    """

    def __init__(self, numbers: Callable[[], RunNumbers], log: Callable[[Mapping[str, float]], None]) -> None:
        self._numbers = numbers
        self._log = log

    def write(self, intervention: Intervention) -> None:
        """Log the present numbers."""
        numbers = self._numbers()._asdict()
        self._log({f"nanguard/{name}": float(value) for name, value in numbers.items() if value is not None})

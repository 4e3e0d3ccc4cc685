"""A run that remedies are tried on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal


@dataclass
class RunControl:
    """Writes down what is done to it."""

    done: list[tuple[object, ...]] = field(default_factory=list)
    loss: Callable[[float, int], float | None] = lambda factor, updates: None
    rate_factor: float = 1.0

    def skip(self) -> None:
        self.done.append(("skip",))

    def restore(self, depth: int) -> None:
        self.done.append(("restore", depth))

    def restore_averages(self) -> None:
        self.done.append(("restore averages",))

    def restore_scale(self) -> None:
        self.done.append(("restore scale",))

    def scale(self, factor: float, min_lr: float, *, limit: bool = False, tried: bool = False) -> None:
        self.done.append(("scale", factor, min_lr))

    def clip(self, value: float, algorithm: Literal["norm", "value"]) -> None:
        self.done.append(("clip", value, algorithm))

    def drop_moments(self) -> None:
        self.done.append(("drop moments",))

    def rehearse(self, factor: float, updates: int) -> float | None:
        return self.loss(factor, updates)

    def rate_factor_of_restored(self) -> float:
        return self.rate_factor

"""What a replay saw, in plain numbers and words: standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Look = Literal["nothing", "batch", "replay"]
"""How much may be looked at: only the evidence, the batch at hand too, or the batch while it is run again."""


@dataclass(frozen=True, slots=True)
class BadField:
    """A tensor of the batch that holds NaN or Inf.

    Attributes:
        field: Where it lies in the batch: ``"0"``, ``"image"``, ``"1.mask"``.
        samples: Indices along its first axis.
        columns: Indices along its second axis; empty where it has none, or all of them are concerned.
    """

    field: str
    samples: tuple[int, ...]
    columns: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Range:
    """The finite numbers of one tensor of the batch.

    Attributes:
        field: Where it lies in the batch.
        dtype: Such as ``"float32"``.
        lowest: Smallest number.
        highest: Largest number.
        mean: Mean.
        std: Standard deviation.
        outliers: Samples whose largest magnitude is far above that of the others.
        usual: Median over samples of the largest magnitude.
    """

    field: str
    dtype: str
    lowest: float
    highest: float
    mean: float
    std: float
    outliers: tuple[int, ...] = ()
    usual: float = 0.0

    @property
    def magnitude(self) -> float:
        """Root of the mean square."""
        return float((self.mean**2 + self.std**2) ** 0.5)


@dataclass(frozen=True, slots=True)
class Origin:
    """The first operation that made a non-finite value out of finite ones.

    Attributes:
        operation: Such as ``"log"``; in the backward pass the forward operation whose derivative it is.
        module: Path of the module it ran in; empty for the module that is trained itself.
        line: ``file.py:12`` in the user's code; empty where it is not known.
        backward: Whether it happened in the backward pass.
        dtype: Of what it made.
        samples: Samples of the batch concerned; empty where all are, or they cannot be told.
        lowest: Smallest number it worked on (for a division: of the denominator); ``None`` where there was none.
        highest: Largest number it worked on.
        smallest: Smallest magnitude it worked on.
        exponent: Of a power; ``None`` where there is none, or more than one.
        from_weights: Whether what it worked on depends on the weights.
        from_target: Whether what it worked on depends on the target.
        empty: Whether it had nothing to work on.
    """

    operation: str
    module: str = ""
    line: str = ""
    backward: bool = False
    dtype: str = "float32"
    samples: tuple[int, ...] = ()
    lowest: float | None = None
    highest: float | None = None
    smallest: float | None = None
    exponent: float | None = None
    from_weights: bool = True
    from_target: bool = False
    empty: bool = False

    @property
    def place(self) -> str:
        """For a person: ``net.2 (log, model.py:41)``."""
        where = f"{self.operation}, {self.line}" if self.line else self.operation
        return f"{self.module or 'training_step'} ({'backward of ' if self.backward else ''}{where})"


@dataclass(frozen=True, slots=True)
class Clues:
    """What looking at the batch and running it again showed.

    Attributes:
        bad_fields: What of the batch is not finite.
        inputs: The floating input with the largest magnitude; ``None`` without one.
        target: The target; ``None`` where the batch has none that is known as such.
        normalises: Whether the first layer normalises its input itself.
        replayed: Whether the batch was run again.
        loss: The loss then.
        gradient_finite: Whether every gradient was finite then; ``None`` where there was no backward pass.
        origin: Where the first non-finite value was made.
        low_precision: Whether it runs in 16 bits.
        finite_in_float32: Whether loss and gradients are finite without autocast; ``None`` where it was not tried.
        norm: Norm of the gradient.
        norms: Gradient norm of every weight, by name, in the order of the module.
    """

    bad_fields: tuple[BadField, ...] = ()
    inputs: Range | None = None
    target: Range | None = None
    normalises: bool = False
    replayed: bool = False
    loss: float | None = None
    gradient_finite: bool | None = None
    origin: Origin | None = None
    low_precision: bool = False
    finite_in_float32: bool | None = None
    norm: float | None = None
    norms: tuple[tuple[str, float], ...] = ()

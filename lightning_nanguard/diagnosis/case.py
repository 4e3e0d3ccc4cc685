"""What a rule gets: a :class:`Case`, in plain numbers and words, without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lightning_nanguard.diagnosis.course import Course
from lightning_nanguard.record.text import with_line
from lightning_nanguard.types import Evidence, Fault, Finding

Look = Literal["nothing", "batch", "replay"]
"""How much may be examined: only the evidence, also the present batch, or also the batch while it is run again."""


@dataclass(frozen=True, slots=True)
class BadField:
    """A tensor of the batch that holds NaN or Inf.

    Attributes:
        field: Its position in the batch: ``"0"``, ``"image"``, ``"1.mask"``.
        samples: Indices along its first axis.
        columns: Indices along its second axis; empty if it has no second axis, or if all columns are bad.
    """

    field: str
    samples: tuple[int, ...]
    columns: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Range:
    """The finite numbers of one tensor of the batch.

    Attributes:
        field: Its position in the batch.
        dtype: Such as ``"float32"``.
        lowest: Smallest number.
        highest: Largest number.
        mean: Mean.
        std: Standard deviation.
        outliers: Samples whose largest magnitude is far above that of the others.
        usual: Median over samples of the largest magnitude.
        before: Largest magnitude of the field in the healthy batches before; 0 if it is not known.
    """

    field: str
    dtype: str
    lowest: float
    highest: float
    mean: float
    std: float
    outliers: tuple[int, ...] = ()
    usual: float = 0.0
    before: float = 0.0

    @property
    def largest(self) -> float:
        """Largest magnitude."""
        return max(abs(self.lowest), abs(self.highest))

    @property
    def magnitude(self) -> float:
        """Root of the mean square."""
        return float((self.mean**2 + self.std**2) ** 0.5)


@dataclass(frozen=True, slots=True)
class Origin:
    """The first operation that gave a non-finite value for finite inputs.

    Attributes:
        operation: Such as ``"log"``; in the backward pass the forward operation whose derivative it is.
        module: Path of the module that called it; empty for the module that is trained itself.
        line: ``file.py:12`` in the user's code; empty if it is not known.
        backward: Whether it was in the backward pass.
        dtype: Data type of its output.
        samples: Samples of the batch with a non-finite output; empty if all have one, or if they are not known.
        lowest: Smallest number of its input (for a division: of the denominator); ``None`` if there was none.
        highest: Largest number of its input.
        smallest: Smallest absolute value of its input.
        exponent: Exponent of a power; ``None`` if there is none, or more than one.
        from_weights: Whether its input depends on the weights.
        from_target: Whether its input depends on the target.
        from_mask: Whether its input depends on a comparison, such as a mask, or the number of elements it selects.
        empty: Whether its input had no elements.
        infinite: Whether one of its inputs was already infinite.
        put_in: Whether the user's code wrote the value as a number (a mask of −inf, a NaN), and it reached the loss.
        given: Names of its arguments that held NaN or +Inf before the pass began; empty without any.
        made_by: The operation that computed its input; empty if it is not known.
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
    from_mask: bool = False
    empty: bool = False
    infinite: bool = False
    put_in: bool = False
    given: str = ""
    made_by: str = ""

    @property
    def place(self) -> str:
        """In words: ``net.2 (log, model.py:41)``."""
        where = with_line(self.operation, self.line)
        return f"{self.module or 'training_step'} ({'backward of ' if self.backward else ''}{where})"


@dataclass(frozen=True, slots=True)
class Change:
    """An element of a weight that moved far more than the others since the last good state.

    Attributes:
        name: ``"parameter net.0.weight"``.
        before: Its value in the good state.
        now: Its present value.
        usual: How far the elements of this weight moved otherwise.
        updated: Whether no other element of it moved at all, and another weight left its range as a whole.
    """

    name: str
    before: float
    now: float
    usual: float
    updated: bool = False


@dataclass(frozen=True, slots=True)
class LabelRelation:
    """Whether labels depend on their inputs.

    Attributes:
        rows: Rows that were compared.
        shared: Share of them whose nearest neighbour has the same label: the highest of several views of the inputs.
        chance: The same share if labels are assigned by chance.
        exceeds: Whether the share is clearly above that of shuffled labels, in at least one view.
    """

    rows: int
    shared: float
    chance: float
    exceeds: bool


@dataclass(frozen=True, slots=True)
class Clues:
    """What the numbers of the batch show, and what running it again showed.

    Attributes:
        bad_fields: The tensors of the batch that are not finite.
        inputs: The floating input with the largest magnitude; ``None`` without one.
        target: The target; ``None`` if the batch has none that is known as such.
        normalises: Whether the first layer normalises its input itself.
        replayed: Whether the batch was run again.
        loss: The loss when it was run again.
        gradient_finite: Whether every gradient was finite then; ``None`` if there was no backward pass.
        origin: The operation that gave the first non-finite value.
        finite_in_float32: Whether loss and gradients are finite without autocast; ``None`` if it was not tried.
        gradient_fits: Whether a gradient that overflows in float16 weights fits in float32; ``None`` if not tried.
        good_loss: The loss under the last good state with the same random numbers; ``None`` if it was not tried.
        good_finite: Whether this loss and the norm of its gradient are finite. If so, not the batch alone is at fault.
        change: A change since the good state that no update explains; ``None`` without one.
        moved_alone: Whether a few elements of a weight moved and the others did not; ``None`` if this is not known.
        norm: Norm of the gradient.
        norms: Gradient norm of every weight, by name, in the order of the module.
        gone_otherwise: Whether loss and gradient are finite with other random numbers; ``None`` if this was not tried.
        bad_buffers: Buffers of the module that hold NaN or +Inf, if the loss is not finite.
        spoilt_buffers: Those of them that hold none in the last good state.
        labels: Whether the labels depend on the inputs; ``None`` if this was not examined.
    """

    bad_fields: tuple[BadField, ...] = ()
    inputs: Range | None = None
    target: Range | None = None
    normalises: bool = False
    replayed: bool = False
    loss: float | None = None
    gradient_finite: bool | None = None
    origin: Origin | None = None
    finite_in_float32: bool | None = None
    gradient_fits: bool | None = None
    good_loss: float | None = None
    good_finite: bool | None = None
    change: Change | None = None
    moved_alone: bool | None = None
    norm: float | None = None
    norms: tuple[tuple[str, float], ...] = ()
    gone_otherwise: bool | None = None
    bad_buffers: tuple[str, ...] = ()
    spoilt_buffers: tuple[str, ...] = ()
    labels: LabelRelation | None = None


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer with a weight, or one activation, on one batch.

    A layer that runs several times is listed once, with the numbers of all its runs together.

    Attributes:
        path: Path of the module, ``"net.2"``. If the user's code multiplies by a weight itself, the path of the weight.
        kind: Class of the module, ``"Linear"``, or the user's call of a function, ``"sigmoid, model.py:12"``.
        inputs: Root mean square of its inputs; ``None`` if they are not floating-point numbers.
        outputs: Root mean square of its outputs.
        lowest: Smallest output.
        highest: Largest output.
        saturated: Share of a bounded activation's outputs within 1 % of its lowest or highest value; else ``None``.
        dead: Share of a ReLU's units that are positive for no sample; ``None`` otherwise, and below eight samples.
        gradient: Norm of the gradient of its weights; ``None`` without weights or a backward pass.
        weight: Norm of its weights; ``None`` without any.
        update: Norm of the last update of its own weights over ``weight``; ``None`` if not known.
    """

    path: str
    kind: str
    inputs: float | None = None
    outputs: float | None = None
    lowest: float | None = None
    highest: float | None = None
    saturated: float | None = None
    dead: float | None = None
    gradient: float | None = None
    weight: float | None = None
    update: float | None = None


@dataclass(frozen=True, slots=True)
class Objective:
    """What the loss was computed from, if a function of ``torch.nn.functional`` computes it.

    Attributes:
        function: ``"cross_entropy"``, ``"nll_loss"``, ``"mse_loss"``, ``"binary_cross_entropy"``, …
        line: ``file.py:12`` in the user's code; empty if it is not known.
        classes: Number of classes in the target (class indices, or one-hot rows); ``None`` if it holds none.
        probabilities: Whether the input of the loss holds probabilities: from 0 to 1, with a sum of 1 over the classes.
        softmax: What computed these probabilities: the path of a module, or a line; empty if it is not known.
        value: The loss.
        chance: Its chance level: log(classes), or the mean square of a target without classes; ``None`` if not known.
        lowest: Smallest class index of the target; ``None`` if it holds none.
        highest: Largest class index.
        outside: Samples whose class index is out of range.
        least: Smallest number of a target that must be from 0 to 1; ``None`` for other targets.
        most: Largest number of such a target.
    """

    function: str
    line: str = ""
    classes: int | None = None
    probabilities: bool = False
    softmax: str = ""
    value: float | None = None
    chance: float | None = None
    lowest: int | None = None
    highest: int | None = None
    outside: tuple[int, ...] = ()
    least: float | None = None
    most: float | None = None

    @property
    def place(self) -> str:
        """In words: ``training_step (cross_entropy, model.py:41)``."""
        return f"training_step ({with_line(self.function, self.line)})"


@dataclass(frozen=True, slots=True)
class GradientCheck:
    """A gradient compared with finite differences of the loss.

    Attributes:
        place: The parameter, or the custom function with its module and line.
        custom: Whether it is a custom function (a ``torch.autograd.Function``).
        error: Largest difference, relative to the larger of the two numbers.
        analytic: The number of the gradient where they differ most.
        numeric: The number of the finite differences there.
    """

    place: str
    error: float
    analytic: float
    numeric: float
    custom: bool = False


@dataclass(frozen=True, slots=True)
class Model:
    """A model and its loss on one batch.

    Attributes:
        layers: Layer by layer, in the order in which they run.
        objective: What the loss was computed from; ``None`` if it is not known.
        loss: The loss.
        updates: Updates made before; 0 for the untrained model.
        checks: Gradients compared with finite differences, if the user asked for it.
    """

    layers: tuple[Layer, ...] = ()
    objective: Objective | None = None
    loss: float | None = None
    updates: int = 0
    checks: tuple[GradientCheck, ...] = ()


@dataclass(frozen=True, slots=True)
class Curvature:
    """The loss of one batch along the direction of an update, and the extreme eigenvalues of its Hessian H.

    Attributes:
        slope: gᵀd: the slope along the direction d of the optimizer's updates. g is the gradient, and for SGD d is g.
        bend: dᵀHd: the curvature along d.
        along: Name of d: ``"the gradient"``, ``"Adam's updates"``.
        steepest: Lower bound of the largest eigenvalue in magnitude; ``None`` if it was not computed.
        typical: Curvature along a random direction.
        largest: Largest eigenvalue (sharpness); ``None`` if it was not computed.
        smallest: Smallest eigenvalue.
    """

    slope: float
    bend: float
    along: str = "the gradient"
    steepest: float | None = None
    typical: float | None = None
    largest: float | None = None
    smallest: float | None = None

    @property
    def largest_rate(self) -> float | None:
        """The rate above which a step along d no longer lowers the loss; ``None`` without a curvature above 0."""
        return 2 * self.slope / self.bend if self.slope > 0 and self.bend > 0 else None


NO_FAULT = Fault("no_fault", "state", "")
"""The fault of a case without a fault: the data, the model or the run is examined nevertheless."""


@dataclass(frozen=True, slots=True)
class EarlierFinding:
    """The finding of an earlier fault of the run.

    Attributes:
        step: Update of that fault.
        fault: Its kind.
        place: Where it was found.
        finding: Its cause.
        lr: Effective learning rate then; ``None`` if it was not known.
    """

    step: int
    fault: str
    place: str
    finding: Finding
    lr: float | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """Everything that a rule may use. A part that was not examined is empty or ``None``.

    Attributes:
        fault: What a detector found; :data:`NO_FAULT` before the first step and in an examination of the run.
        evidence: What the guard knows.
        clues: What the batch shows, and what running it again showed.
        model: The model and its loss on one batch.
        course: The loss and the gradients of the newest updates.
        curvature: The curvature of the loss at the present weights.
        earlier: The findings of earlier faults of this run, oldest first.
        unstable: A hyperparameter with which the optimizer diverges whatever the gradients are, in words; ``""`` if
            there is none.
    """

    fault: Fault = NO_FAULT
    evidence: Evidence = field(default_factory=lambda: Evidence(step=0))
    clues: Clues = field(default_factory=Clues)
    model: Model | None = None
    course: Course | None = None
    curvature: Curvature | None = None
    earlier: tuple[EarlierFinding, ...] = ()
    unstable: str = ""

    def times(self, cause: str, place: str) -> int:
        """How often a cause was found at a place, this time included."""
        return 1 + sum((one.finding.cause, one.finding.place) == (cause, place) for one in self.earlier)

    def earlier_here(self) -> tuple[EarlierFinding, ...]:
        """The findings of earlier faults of this kind at this place."""
        return tuple(one for one in self.earlier if (one.fault, one.place) == (self.fault.kind, self.fault.place))

"""What a rule is given: a :class:`Case`, in plain numbers and words, standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lightning_nanguard.thresholds.diagnosis import PlateauThresholds
from lightning_nanguard.types import Evidence, Fault, Finding

_PLATEAU = PlateauThresholds()

Look = Literal["nothing", "batch", "replay"]
"""How much may be looked at: only the evidence, the present batch too, or the batch while it is run again."""


@dataclass(frozen=True, slots=True)
class BadField:
    """A tensor of the batch that holds NaN or Inf.

    Attributes:
        field: Where it lies in the batch: ``"0"``, ``"image"``, ``"1.mask"``.
        samples: Indices along its first axis.
        columns: Indices along its second axis; empty if it has none, or all of them are concerned.
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
    def largest(self) -> float:
        """Largest magnitude."""
        return max(abs(self.lowest), abs(self.highest))

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
        line: ``file.py:12`` in the user's code; empty if it is not known.
        backward: Whether it happened in the backward pass.
        dtype: Of what it made.
        samples: Samples of the batch concerned; empty if all are, or they cannot be told.
        lowest: Smallest number it worked on (for a division: of the denominator); ``None`` if there was none.
        highest: Largest number it worked on.
        smallest: Smallest magnitude it worked on.
        exponent: Of a power; ``None`` if there is none, or more than one.
        from_weights: Whether what it worked on depends on the weights.
        from_target: Whether what it worked on depends on the target.
        from_mask: Whether what it worked on depends on a comparison, as a mask and the count of what it leaves do.
        empty: Whether it had nothing to work on.
        put_in: Whether the value was put in as a number (a mask of −inf, a NaN), and came through to the loss.
        given: Names of its arguments that held NaN or +Inf before the pass began; empty without any.
        made_by: The operation that made what it worked on; empty if it is not known.
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
    put_in: bool = False
    given: str = ""
    made_by: str = ""

    @property
    def place(self) -> str:
        """For a person: ``net.2 (log, model.py:41)``."""
        where = f"{self.operation}, {self.line}" if self.line else self.operation
        return f"{self.module or 'training_step'} ({'backward of ' if self.backward else ''}{where})"


@dataclass(frozen=True, slots=True)
class Change:
    """An element of a weight that moved out of all proportion to the others since the last good state.

    Attributes:
        name: ``"parameter net.0.weight"``.
        before: What it was in the good state.
        now: What it is.
        usual: How far the elements of this weight moved otherwise.
    """

    name: str
    before: float
    now: float
    usual: float


@dataclass(frozen=True, slots=True)
class LabelRelation:
    """Whether labels have anything to do with their inputs.

    Attributes:
        rows: Rows that were compared.
        shared: Share of them whose nearest neighbour has the same label, in the view of the inputs where it is highest.
        chance: What it would be by chance.
        exceeds: Whether it is clearly above what other orders of the labels give, in at least one view.
    """

    rows: int
    shared: float
    chance: float
    exceeds: bool


@dataclass(frozen=True, slots=True)
class Clues:
    """What the batch shows by itself, and what running it again showed.

    Attributes:
        bad_fields: What of the batch is not finite.
        inputs: The floating input with the largest magnitude; ``None`` without one.
        target: The target; ``None`` if the batch has none that is known as such.
        normalises: Whether the first layer normalises its input itself.
        replayed: Whether the batch was run again.
        loss: The loss then.
        gradient_finite: Whether every gradient was finite then; ``None`` if there was no backward pass.
        origin: Where the first non-finite value was made.
        low_precision: Whether it runs in 16 bits.
        finite_in_float32: Whether loss and gradients are finite without autocast; ``None`` if it was not tried.
        good_loss: The loss under the last good state with the same random numbers; ``None`` if it was not tried.
        good_norm: Norm of the gradient there.
        good_finite: Whether both were finite: then the fault is not the batch's alone.
        change: What no update explains of the difference between the present state and the good one.
        moved_alone: Whether there is such a change: a few elements of a weight moved, and the others did not; ``None``
            where the two were not compared.
        norm: Norm of the gradient.
        norms: Gradient norm of every weight, by name, in the order of the module.
        gone_otherwise: Whether loss and gradient are finite with other random numbers than the step's; ``None`` where
            that was not tried.
        bad_buffers: Buffers of the module that hold NaN or +Inf, where the loss is not finite.
        labels: Whether the labels have anything to do with the inputs; ``None`` if that was not looked at.
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
    good_loss: float | None = None
    good_norm: float | None = None
    good_finite: bool | None = None
    change: Change | None = None
    moved_alone: bool | None = None
    norm: float | None = None
    norms: tuple[tuple[str, float], ...] = ()
    gone_otherwise: bool | None = None
    bad_buffers: tuple[str, ...] = ()
    labels: LabelRelation | None = None


@dataclass(frozen=True, slots=True)
class Layer:
    """One weight that is multiplied with, or one activation, on one batch; in the order in which they run.

    What runs several times stands here once, with the numbers of all its runs together.

    Attributes:
        path: Path of the module, ``"net.2"``; of a weight that a module of the user's multiplies with by itself, the
            path of the weight.
        kind: Name of the module's class, ``"Linear"``, ``"Sigmoid"``, or what the user's code calls, with its line:
            ``"sigmoid, model.py:12"``.
        inputs: Root mean square of what it was given; ``None`` if that holds no floating numbers.
        outputs: Root mean square of what it gave.
        lowest: Smallest number it gave.
        highest: Largest number it gave.
        saturated: Share of the outputs of a bounded activation (sigmoid, tanh, …) that lie within 1 % of its range of
            one of its ends; ``None`` for what is not bounded.
        dead: Share of the units of a rectifier (ReLU) that are positive for no sample; ``None`` for anything else, and
            for fewer than eight samples.
        gradient: Norm of the gradient of its weights; ``None`` without weights or a backward pass.
        weight: Norm of its weights; ``None`` without any.
        update: Norm of the last update of its own weights over ``weight``; ``None`` if it is not known.
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
    """What the loss was computed from, as far as it goes through a function of ``torch.nn.functional``.

    Attributes:
        function: ``"cross_entropy"``, ``"nll_loss"``, ``"mse_loss"``, ``"binary_cross_entropy"``, …
        line: ``file.py:12`` in the user's code; empty if it is not known.
        classes: How many classes the target tells apart (class indices, or rows that are one-hot); ``None`` if the
            target holds no classes.
        probabilities: Whether what it was given are probabilities: within 0 and 1, summing to 1 over the classes.
        softmax: Where those were made: the path of a module, or a line; empty if it is not known.
        value: The loss it gave.
        chance: The loss at chance level: log(classes), or the mean square of a target that is no class; ``None`` where
            it is not known.
        lowest: Smallest class index of the target; ``None`` if it holds none.
        highest: Largest class index.
        outside: Samples whose class index is none of the classes.
        least: Smallest number of a target that should lie within 0 and 1; ``None`` if none should.
        most: Largest number of it.
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


@dataclass(frozen=True, slots=True)
class GradientCheck:
    """A gradient against finite differences of the loss.

    Attributes:
        place: The parameter, or the custom function with its module and line.
        custom: Whether it is a custom function (a ``torch.autograd.Function``).
        error: Largest difference relative to the larger of the two.
        analytic: The gradient's number there.
        numeric: What finite differences gave there.
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
        checks: Gradients against finite differences, where that was asked for.
    """

    layers: tuple[Layer, ...] = ()
    objective: Objective | None = None
    loss: float | None = None
    updates: int = 0
    checks: tuple[GradientCheck, ...] = ()


@dataclass(frozen=True, slots=True)
class Curvature:
    """The loss of one batch along its gradient g, and at the ends of the spectrum of its Hessian H.

    Attributes:
        slope: gᵀd: the slope along the direction d of the optimizer's updates, which for SGD is g itself.
        bend: dᵀHd.
        along: What d is: ``"the gradient"``, ``"Adam's updates"``.
        steepest: Lower bound of the largest eigenvalue in magnitude; ``None`` if it was not computed.
        typical: Mean curvature along random directions.
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
        """The rate above which a step along d no longer lowers the loss; ``None`` if it bends down."""
        return 2 * self.slope / self.bend if self.slope > 0 and self.bend > 0 else None


@dataclass(frozen=True, slots=True)
class Course:
    """How a run has gone over its last updates, which were all finite.

    Attributes:
        updates: Updates looked at.
        first: Loss of the untrained model.
        before: Median loss at the start of the stretch.
        now: Median loss at its end.
        spread: Median of how far the level moves, either way, from one eighth of the stretch to the next.
        best: Lowest median so far.
        norm: Median gradient norm.
        opposed: Cosine of a batch's gradients before and after one update on it; ``None`` if it was not measured.
        noise: Norm of the gradient's noise over that of its mean; ``None`` if it was not measured.
        batches: Batches that the noise was measured over.
        clear: How many standard errors the mean of their gradients stands out of its noise by.
        lr: Effective learning rate of the first group.
        batch_size: Samples in a batch; ``None`` if that is not known.
        chance: Loss of a model that knows nothing; ``None`` if it is not known.
    """

    updates: int
    first: float
    before: float
    now: float
    spread: float
    best: float
    norm: float
    opposed: float | None = None
    noise: float | None = None
    batches: int = 0
    clear: float = 0.0
    lr: float | None = None
    batch_size: int | None = None
    chance: float | None = None

    def moves(self, thresholds: PlateauThresholds = _PLATEAU) -> bool:
        """Whether the loss has fallen, by more than it moves from one part of the stretch to the next."""
        least = thresholds.moved * max(abs(self.first), 1e-12)
        return self.before - self.now > max(least, thresholds.spreads * self.spread)

    def falls(self, thresholds: PlateauThresholds = _PLATEAU) -> bool:
        """Whether the loss falls by a share of its own level, and clearly, be that little of the first loss."""
        least = thresholds.fallen * abs(self.before)
        return self.before - self.now > max(least, thresholds.spreads * self.spread)

    def rises(self, thresholds: PlateauThresholds = _PLATEAU) -> bool:
        """Whether the loss has left its level upwards: it is another loss now, or it diverges."""
        least = thresholds.risen * abs(self.first)
        return self.now - self.before > max(least, thresholds.spreads * self.spread)

    def high(self, thresholds: PlateauThresholds = _PLATEAU) -> bool:
        """Whether most of the untrained model's loss is still there, or the loss is at chance level."""
        untrained = self.now > self.first - thresholds.learned * max(abs(self.first), 1e-12)
        return untrained or (self.chance is not None and self.now > thresholds.near_chance * self.chance)


NO_FAULT = Fault("no_fault", "state", "")
"""The fault of a case in which nothing happened: the data, the model or the run is looked at all the same."""


@dataclass(frozen=True, slots=True)
class EarlierFinding:
    """What was found at an earlier fault of the run.

    Attributes:
        step: Update of that fault.
        fault: Its kind.
        place: Where it showed.
        finding: Why it happened.
        lr: Effective learning rate then; ``None`` if it was not known.
    """

    step: int
    fault: str
    place: str
    finding: Finding
    lr: float | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """All that a rule may look at; each part is empty or ``None`` if nobody looked.

    Attributes:
        fault: What a detector found; :data:`NO_FAULT` before the first step and in an examination of the run.
        evidence: What the guard knows.
        clues: What the batch shows, and running it again.
        model: The model and its loss on one batch.
        course: How the run has gone.
        curvature: The loss around the present weights.
        earlier: What was found at earlier faults of this run, oldest first.
    """

    fault: Fault = NO_FAULT
    evidence: Evidence = field(default_factory=lambda: Evidence(step=0))
    clues: Clues = field(default_factory=Clues)
    model: Model | None = None
    course: Course | None = None
    curvature: Curvature | None = None
    earlier: tuple[EarlierFinding, ...] = ()

    def earlier_here(self) -> tuple[EarlierFinding, ...]:
        """What was found at earlier faults of this kind at this place."""
        return tuple(one for one in self.earlier if (one.fault, one.place) == (self.fault.kind, self.fault.place))

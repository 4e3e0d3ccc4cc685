"""Runs made from a seed: the catalogue of forms, and the draw of a case from a form.

A form is written as ``task/optimizer`` with what else is special about it behind further slashes: a schedule
(``cosine``, ``onecycle``, …), a precision (``bf16``, ``fp16``), accumulation (``x4``), ``ema``, ``clip``, ``ordered``
(no shuffling), a batch size (``batch1``), steps (``steps400``), a rate (``@0.3``; ``*2`` for twice the good one).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from . import faults
from .faults import Fault
from .models import TASKS, Task
from .rates import RATES
from .running import SHAPES

NAN, INF = math.nan, math.inf


@dataclass(frozen=True)
class Case:
    """One run, all of it: the same case is the same run, bit by bit.

    Attributes:
        name: Form and seed.
        task: Key of :data:`~.models.TASKS`.
        optimizer: Name of the optimizer.
        rate: Learning rate without the fault.
        steps: Optimizer steps.
        seed: Seed of the weights, the order of the data, and the places of the fault.
        fault: What goes wrong, ``None`` for a healthy run.
        schedule: Key of :data:`~.running.SHAPES`.
        precision: ``"32"``, ``"bf16"`` or ``"fp16"``.
        accumulate: Batches a step.
        batch: Batch size, ``None`` for the task's.
        shuffle: Whether every epoch has its own order, ``None`` for the task's.
        clip_val: ``gradient_clip_val`` of the run.
        average: Whether an exponential average of the weights is kept and used in the end.
        savable: Whether anything can be learned; if not, a clear error is what counts.
        own_task: A task that the seed drew, for a form whose task is not in the table.
        processes: Ranks that share each batch.
        heading: Heading of a failing run in the report, where it is not its fault's.
    """

    name: str
    task: str
    optimizer: str
    rate: float
    steps: int
    seed: int
    fault: Fault | None = None
    schedule: str = "constant"
    precision: str = "32"
    accumulate: int = 1
    batch: int | None = None
    shuffle: bool | None = None
    clip_val: float | None = None
    average: bool = False
    savable: bool = True
    own_task: Task | None = field(default=None, repr=False)
    processes: int = 1
    heading: str = ""

    @property
    def recipe(self) -> Task:
        """What is learned, by what, from what."""
        return self.own_task or TASKS[self.task]

    @property
    def twin(self) -> Case:
        """The same run without the fault."""
        clip_val = 1.0 if isinstance(self.fault, faults.Unclipped) else self.clip_val
        return replace(self, fault=None, clip_val=clip_val)

    @property
    def form(self) -> str:
        """Name of the form."""
        return self.name.rpartition("#")[0]

    @property
    def group(self) -> str:
        """Heading in the report."""
        return "healthy" if self.fault is None else self.heading or self.fault.group


TAMER = {("mlp", "sgd"): 0.7}
"""Where the good rate of the table is too near the edge for every seed, the share of it that is not."""


def steps_of(task: str, optimizer: str) -> tuple[int, int | None]:
    """Steps and batch size: L-BFGS takes few steps on large batches."""
    return (60, 256) if optimizer == "lbfgs" else (TASKS[task].steps, None)


@dataclass(frozen=True)
class Room:
    """What a fault may depend on when it is drawn.

    Attributes:
        dice: Source of chance.
        steps: Optimizer steps of the run.
        batches: Batches of the run.
        largest: The largest rate that converges, over the rate of the run.
    """

    dice: random.Random
    steps: int
    batches: int
    largest: float

    def near(self, value: float, spread: float = 1.4) -> float:
        """A number around ``value``."""
        return value * spread ** self.dice.uniform(-1, 1)

    def when(self, first: float = 0.08, last: float = 0.6) -> int:
        """A batch between two shares of the run."""
        return max(2, int(self.batches * self.dice.uniform(first, last)))


Drawn = Callable[[Room], Fault]


@dataclass(frozen=True)
class Form:
    """A kind of run, of which a seed makes a case."""

    name: str
    task: str
    optimizer: str
    fault: Drawn | None = None
    rate: float | None = None
    times: float = 1.0
    steps: int | None = None
    savable: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def draw(self, seed: int) -> Case:
        """The case of this form that ``seed`` stands for."""
        dice = random.Random(f"{self.name} {seed}")
        own: Task | None = self.options.get("own_task")
        steps, batch = (own.steps, None) if own else steps_of(self.task, self.optimizer)
        steps = self.steps or steps
        unknown = (self.rate or math.nan, self.rate or math.nan, 0.0)
        good, largest, _ = RATES.get(self.task, {}).get(self.optimizer, unknown)
        tamed = TAMER.get((self.task, self.optimizer), 1.0)
        rate = self.rate or good * tamed * self.times * dice.uniform(0.75, 1.0)
        options = {"batch": batch, **self.options}
        room = Room(dice, steps, steps * options.get("accumulate", 1), largest / rate)
        number = dice.randrange(2**31)
        fault = self.fault(room) if self.fault else None
        name, savable = f"{self.name}#{seed}", self.savable
        return Case(name, self.task, self.optimizer, rate, steps, number, fault, savable=savable, **options)


def form(label: str, spec: str, fault: Drawn | None = None, *, savable: bool = True) -> Form:
    """A form from its short notation.

    Raises:
        ValueError: When a word of ``spec`` means nothing.
    """
    task, optimizer, *words = spec.split("/")
    options: dict[str, Any] = {}
    rate, times, steps = None, 1.0, None
    for word in words:
        if word in SHAPES:
            options["schedule"] = word
        elif word in ("bf16", "fp16"):
            options["precision"] = word
        elif word == "ema":
            options["average"] = True
        elif word == "clip":
            options["clip_val"] = 1.0
        elif word == "ordered":
            options["shuffle"] = False
        elif word.startswith("batch"):
            options["batch"] = int(word[5:])
        elif word.startswith("steps"):
            steps = int(word[5:])
        elif word.startswith("x"):
            options["accumulate"] = int(word[1:])
        elif word.startswith("@"):
            rate = float(word[1:])
        elif word.startswith("*"):
            times = float(word[1:])
        else:
            raise ValueError(f"{spec!r}: {word!r} is no schedule, precision, size or rate")
    return Form(f"{label}:{spec}", task, optimizer, fault, rate, times, steps, savable, options)


def _forms(label: str, fault: Drawn | None, specs: str, *, savable: bool = True) -> tuple[Form, ...]:
    return tuple(form(label, spec, fault, savable=savable) for spec in specs.split())


# -------------------------------------------------------------------------------------------------- what is drawn


def rate(factor: float) -> Drawn:
    """``factor`` times the largest rate that converges."""
    return lambda room: faults.Rate(room.near(factor, 1.25) * room.largest)


def peak(factor: float, shortest: int = 6, longest: int = 20) -> Drawn:
    """A peak in mid-run."""
    return lambda room: faults.Peak(
        room.near(factor) * room.largest,
        int(room.steps * room.dice.uniform(0.15, 0.45)),
        room.dice.randint(shortest, longest),
    )


def ramp(factor: float) -> Drawn:
    """A rate that grows over the run."""
    return lambda room: faults.Ramp(room.near(factor) * room.largest, int(room.steps * room.dice.uniform(0, 0.2)))


def bad_loss(value: float, length: int = 1, first: float = 0.08, last: float = 0.6, transient: bool = False) -> Drawn:
    """A bad loss, or ``length`` in a row."""
    return lambda room: faults.BadLoss(
        room.dice.choice([value, -value]), room.when(first, last), length, transient
    )  # fmt: skip


def bad_gradient(
    value: float, length: int = 1, first: float = 0.08, last: float = 0.6, transient: bool = False
) -> Drawn:
    """A bad element in a gradient."""
    return lambda room: faults.BadGradient(value, room.when(first, last), length, transient)


def bad_weight(value: float, whole: bool = False, first: float = 0.08, last: float = 0.6) -> Drawn:
    """A weight, or a whole matrix, that flips."""
    return lambda room: faults.BadWeight(room.dice.choice([value, -value]), room.when(first, last), whole)


def bad_buffer(which: str, value: float) -> Drawn:
    """A batch-norm statistic that flips."""
    return lambda room: faults.BadBuffer(value, room.when(), which)  # type: ignore[arg-type]


def bad_moment(value: float, whole: bool = False) -> Drawn:
    """A moment that flips."""
    return lambda room: faults.BadMoment(value, room.when(), whole)


def bad_average(value: float) -> Drawn:
    """An averaged weight that flips."""
    return lambda room: faults.BadAverage(value, room.when())


def bad_samples(value: float, where: int = 0, most: int = 3, whole: bool = False) -> Drawn:
    """A few bad samples."""
    return lambda room: faults.BadSamples(value, room.dice.randint(1, most), where, whole)


def bad_stretch(value: float, batches: int = 12, where: int = 0, whole: bool = False) -> Drawn:
    """Bad batches in a row."""
    return lambda room: faults.BadStretch(value, batches, room.dice.uniform(0.1, 0.9), where, whole)


def stretched(factor: float, layer: int) -> Drawn:
    """A matrix that starts too large."""
    return lambda room: faults.Stretched(room.near(factor, 1.15), layer)


FAILING: tuple[Form, ...] = (
    # The rate is too high from the start.
    *_forms("rate10", rate(10), """linear/sgd linear/momentum regression/sgd mlp/sgd mlp/momentum mlp/adam gru/adam
            rnn/sgd transformer/adamw autoencoder/adam wine/rmsprop"""),
    *_forms("rate100", rate(100), """linear/momentum regression/adam mlp/sgd mlp/adamw mlp/adagrad mlp/rmsprop
            cnn/momentum cnn/adam gru/sgd rnn/adam transformer/adamw/onecycle transformer/sgd embedding/sgd
            autoencoder/adam autoencoder/rmsprop gan/adam bag/adam pixels/momentum pixels/adam mlp/adam/bf16
            mlp/momentum/fp16 mlp/momentum/x4
            linear/lbfgs/batch330 linear/sgd/clip"""),
    *_forms("rate1000", rate(1000), """linear/sgd linear/adam mlp/momentum/cosine/steps360 mlp/adam gru/rmsprop
            rnn/momentum
            transformer/adamw embedding/adagrad autoencoder/sgd/restarts cnn/sgd mlp/adam/ema logistic/adam"""),
    *_forms("rate10000", rate(10000), """linear/rmsprop mlp/sgd mlp/adam regression/momentum transformer/adam
            autoencoder/adagrad gru/adamw"""),
    # The schedule has a peak.
    *_forms("peak", peak(100), """mlp/adam mlp/adamw/cosine mlp/rmsprop mlp/sgd/restarts/steps360 regression/momentum
            gru/adam rnn/sgd transformer/adamw/cosine autoencoder/adam embedding/adam linear/sgd/step cnn/adam/bf16
            wine/momentum mlp/momentum/x2"""),
    *_forms("peak1000", peak(1000), "transformer/adamw/warmup mlp/sgd bag/adagrad autoencoder/rmsprop"),
    *_forms("dead_units", peak(30, 20, 40), "mlp/sgd mlp/momentum regression/sgd"),
    # The rate grows, and no step looks wrong.
    *_forms("ramp", ramp(100), """linear/sgd linear/momentum regression/sgd mlp/sgd mlp/adam transformer/adamw
            gru/rmsprop rnn/momentum autoencoder/adam embedding/sgd"""),
    # Exploding gradients.
    *_forms("unclipped", lambda room: faults.Unclipped(), """rnn/sgd/@0.6 bursts/sgd/@0.1
            bursts/momentum/@0.02 bursts_mlp/sgd/@0.1 bursts_mlp/momentum/@0.02"""),
    *_forms("stretched", stretched(20, 0), "regression/momentum"),
    *_forms("stretched", stretched(10, 2), "autoencoder/momentum"),
    *_forms("stretched", stretched(3, 1), "relu_rnn/sgd relu_rnn/momentum"),
    # One loss.
    *_forms("loss_nan", bad_loss(NAN), """linear/sgd mlp/adam transformer/adamw/cosine rnn/rmsprop gan/adam
            wine/lbfgs/*0.3/batch128
            cnn/adamw/x4 mlp/adagrad/ema"""),
    *_forms("loss_inf", bad_loss(INF), "regression/momentum transformer/adam/bf16 embedding/adagrad"),
    *_forms("loss_1e30", bad_loss(1e30), "linear/sgd mlp/adam cnn/momentum transformer/adamw gru/rmsprop"),
    *_forms("loss_transient", bad_loss(NAN, transient=True), "mlp/adamw autoencoder/sgd"),
    *_forms("loss_run", bad_loss(NAN, length=12), "mlp/adam linear/momentum"),
    *_forms("loss_first", bad_loss(NAN, 2, 0, 0), "mlp/adam cnn/sgd"),
    *_forms("loss_late", bad_loss(NAN, 1, 0.975, 0.995), "mlp/adam linear/sgd"),
    # One gradient.
    *_forms("gradient_nan", bad_gradient(NAN), """linear/momentum mlp/sgd/onecycle cnn/adam autoencoder/adamw/restarts
            embedding/rmsprop bag/adagrad gru/adam/x2 linear/lbfgs/batch330"""),
    *_forms("gradient_inf", bad_gradient(INF, transient=True), "mlp/momentum transformer/adamw/ema"),
    *_forms("gradient_1e25", bad_gradient(1e25), "mlp/adamw linear/adam mlp/sgd rnn/rmsprop transformer/adam"),
    # State that goes bad by itself.
    *_forms("weight_nan", bad_weight(NAN), """linear/sgd mlp/adam/cosine transformer/adamw gan/adam gru/adam/bf16
            wine/lbfgs/*0.3/batch128 cnn/momentum/fp16 mlp/adam/fp16"""),
    *_forms("weight_1e20", bad_weight(1e20), """mlp/momentum linear/adam autoencoder/momentum transformer/sgd
            embedding/adam"""),
    *_forms("weight_matrix", bad_weight(1e4, whole=True), "mlp/sgd mlp/adam rnn/adam"),
    *_forms("weight_late", bad_weight(NAN, False, 0.975, 0.995), "mlp/adam linear/sgd"),
    *_forms("norm_variance", bad_buffer("running_var", NAN), "cnn/adam cnn/momentum/onecycle"),
    *_forms("norm_variance_inf", bad_buffer("running_var", INF), "cnn/sgd"),
    *_forms("norm_mean", bad_buffer("running_mean", NAN), "cnn/adamw/bf16 cnn/rmsprop/ema"),
    *_forms("moment_inf", bad_moment(INF), "mlp/adam transformer/adamw/cosine regression/rmsprop embedding/adagrad"),
    *_forms("moments_inf", bad_moment(INF, whole=True), "mlp/adamw autoencoder/adam gan/adam"),
    *_forms("moment_nan", bad_moment(NAN), "mlp/momentum mlp/adam"),
    *_forms("average_nan", bad_average(NAN), "mlp/adam/ema transformer/adamw/ema"),
    *_forms("average_1e20", bad_average(1e20), "mlp/sgd/ema"),
    # Data.
    *_forms("input_nan", bad_samples(NAN), """linear/sgd mlp/adam cnn/momentum gru/rmsprop autoencoder/adamw
            regression/adagrad cnn/adam/fp16 cnn/adamw/bf16 mlp/sgd/x4 mlp/adam/ema wine/momentum/step"""),
    *_forms("input_nan_one", bad_samples(NAN, most=1), "linear/lbfgs/batch100 cnn/adam/x2 regression/adam"),
    *_forms("input_inf", bad_samples(INF), "mlp/momentum/restarts/steps360 cnn/sgd"),
    *_forms("input_1e30", bad_samples(1e30), "linear/adam mlp/sgd autoencoder/rmsprop"),
    *_forms("input_1e15", bad_samples(1e15, whole=True), "cnn/adam cnn/momentum"),
    *_forms("target_nan", bad_samples(NAN, 1), "regression/adam embedding/sgd linear/rmsprop logistic/momentum"),
    *_forms("target_1e15", bad_samples(1e15, 1), "linear/sgd regression/adamw embedding/momentum"),
    *_forms("log_of_negative", bad_samples(-1.0, 1), "log_target/sgd log_target/adam/cosine/steps400"),
    *_forms("log_of_zero", bad_samples(0.0, 1), "log_target/momentum log_target/rmsprop"),
    *_forms("exp_overflow", bad_samples(1e3, whole=True), "by_hand/adam by_hand/sgd by_hand/adagrad"),
    *_forms("empty_mask", bad_samples(0, whole=True), "bag/adam bag/sgd bag/adamw/cosine"),
    *_forms("sqrt_at_zero", bad_samples(0, whole=True), "root/sgd/*0.5 root/adam/*0.4 root/momentum/cosine"),
    *_forms("stretch_nan", bad_stretch(NAN), "mlp/adam/ordered cnn/momentum/ordered autoencoder/adam/ordered"),
    *_forms("stretch_target", bad_stretch(NAN, 12, 1), "embedding/adam/ordered"),
    *_forms("stretch_1e4", bad_stretch(1e4, 12), "mlp/sgd/ordered autoencoder/momentum/ordered"),
    *_forms("stretch_inf", bad_stretch(INF, 5, 0), "gru/adam/ordered"),
    # Nothing can be learned: the run has to say so.
    *_forms("all_nan", lambda room: faults.AllBad(NAN), "mlp/adam regression/sgd", savable=False),
    *_forms("all_negative", lambda room: faults.AllBad(-1.0, 1), "log_target/adam", savable=False),
    *_forms("weights_nan", lambda room: faults.BadStart(NAN), "mlp/adamw cnn/sgd", savable=False),
)  # fmt: skip
"""What fails."""

HEALTHY: tuple[Form, ...] = (
    # Every optimizer at its good rate, every family.
    *_forms("plain", None, """linear/sgd linear/lbfgs linear/rmsprop logistic/adam mlp/sgd mlp/momentum mlp/adam
            mlp/adamw mlp/rmsprop mlp/adagrad linear/lbfgs/*5/batch330 wine/lbfgs/*0.3/batch128
            cnn/adam cnn/momentum gru/adam rnn/rmsprop
            transformer/adamw embedding/adagrad bag/adam autoencoder/adam pixels/adam gan/adam gan/rmsprop
            by_hand/adam root/sgd/*0.5 wine/adagrad"""),
    # Schedules, precisions, accumulation, averages.
    *_forms("schedule", None, """mlp/momentum/onecycle mlp/sgd/restarts transformer/adamw/restarts cnn/adam/warmup
            mlp/adam/cosine gru/adam/step linear/sgd/exponential"""),
    *_forms("precision", None, "mlp/adam/bf16 transformer/adamw/bf16 mlp/momentum/fp16 cnn/adam/fp16 linear/sgd/fp16"),
    *_forms("accumulation", None, "mlp/adam/x4 cnn/momentum/x2 mlp/sgd/x3/fp16"),
    *_forms("average", None, "mlp/adam/ema cnn/momentum/ema"),
    *_forms("clipped", None, "rnn/sgd/clip gru/adam/clip"),
    # Losses that look wrong.
    *_forms("negative_loss", None, "nll/adam negative/adam negative/sgd"),
    *_forms("heavy_tails", None, "student/adam student/sgd student_linear/sgd"),
    *_forms("batch_of_one", None, """linear/sgd/*0.05/batch1 mlp/sgd/*0.05/batch1 regression/adam/*0.1/batch1
            student_linear/sgd/*0.02/batch1"""),
    *_forms("label_noise", None, "noisy_labels/adam noisy_labels/sgd"),
    *_forms("rare_weights", None, "rare_weights/adam rare_weights/sgd"),
    *_forms("policy_gradient", None, "reinforce/adam reinforce/sgd"),
    *_forms("contrastive", None, "contrastive/adam contrastive/sgd"),
    *_forms("dropout", None, "dropout/adam dropout/sgd"),
    # Losses that rise or stand still, and all is well.
    *_forms("curriculum", None, "curriculum/adam curriculum/sgd"),
    *_forms("drift", None, "drift/sgd drift/adam/@0.1"),
    *_forms("switch", None, "switch/adam switch/sgd"),
    *_forms("penalty", None, "penalty/adam penalty/sgd"),
    *_forms("zero_loss", None, "hinge/adam hinge/sgd"),
    *_forms("vanishing_gradient", None, "linear/lbfgs/steps150 wine/momentum/steps600"),
    *_forms("flat", None, "parity/adam/@0.001/steps600 parity/sgd/@0.01/steps600 mlp/sgd/*0.001 mlp/adam/@0.0"),
    *_forms("frozen", None, "frozen/adam frozen/sgd"),
    *_forms("overshoot", None, "mlp/momentum/*3 regression/sgd/*3 mlp/adam/*5 autoencoder/adam/*5"),
)  # fmt: skip
"""What must be left alone."""

"""What a seed stands for: a run, its fault, and the guard it meets."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial

from torch import optim

from benchmarks.transient.draws import AVERAGES, SCHEDULES
from benchmarks.transient.draws import OPTIMIZERS as WITH_STATE

EPOCHS, BATCHES, SIZE = 2, 24, 16

MODELS = ("mlp", "wine", "cnn", "gru", "transformer", "embedding", "regression", "dropout", "nll", "hinge")
"""Names of the tasks of the rescue suite that are trained."""

OPTIMIZERS = {**WITH_STATE, "sgd": partial(optim.SGD, lr=0.05)}

IN_BATCH = ("input", "target", "loss", "gradient", "gradients")
"""Kinds that belong to a batch: it meets them again whenever it is run again, if the fault lasts."""

IN_STATE = ("weight", "buffer", "moment", "scaler", "average")
"""Kinds that spoil state between two batches."""

KINDS = (*IN_BATCH, *IN_STATE, "metric", "rate", "exception", "none")
NUMBERS = ("NaN", "Inf", "-Inf", "1e30", "subnormal", "bit", "sign", "× 300")
MOMENTS = ("first", "accumulation", "last", "validation", "save", "after", "pending", "any", "any")
MODES = ("automatic", "automatic", "automatic", "manual", "two optimizers")
COMPANIONS = ("checkpoint", "early stopping", "rate monitor", "weight averaging", "last good")


@dataclass(frozen=True)
class Draw:
    """One run, its fault and its guard.

    Attributes:
        seed: Seed of the model, the data and the random streams.
        kind: What is struck.
        value: What becomes of it.
        at: Number of the micro-batch, over all epochs.
        lasting: Whether a batch meets its fault again when it is run again.
        moment: When it strikes; ``at`` follows from it.
        task: Name of the task: model, data and loss.
        optimizer: Name of the optimizer.
        schedule: Name of the scheduler.
        average: Which average a callback keeps.
        accumulate: Micro-batches of an update.
        clip: Largest gradient norm; ``None`` does not clip.
        precision: Of the Trainer.
        mode: Who makes the step: Lightning, or ``training_step`` with one optimizer or two.
        companions: Other callbacks, and whether the guard keeps a last good checkpoint.
        readback: Of the guard.
        act_on: Of the guard.
        every: Updates between the guard's snapshots.
        first: Whether the guard is the first in the list of callbacks, or the last.
    """

    seed: int
    kind: str
    value: str
    at: int
    lasting: bool
    moment: str
    task: str
    optimizer: str
    schedule: str
    average: str
    accumulate: int
    clip: float | None
    precision: str
    mode: str
    companions: tuple[str, ...]
    readback: str
    act_on: str
    every: int
    first: bool

    @property
    def steps(self) -> int:
        """Updates of the run."""
        return EPOCHS * BATCHES // self.accumulate

    @property
    def batches(self) -> tuple[int, ...]:
        """Numbers of the batches to which the fault belongs; none where it belongs to the state."""
        return (self.at,) if self.kind in IN_BATCH and self.moment != "validation" else ()


def draw(seed: int, number: int) -> Draw:
    """The draw of that number."""
    dice = random.Random(f"chaos {seed}/{number}")
    kind = KINDS[number % len(KINDS)]
    mode = dice.choice(MODES)
    by_hand = mode != "automatic"
    task = dice.choice(_tasks(kind))
    optimizer = dice.choice(list(WITH_STATE if kind == "moment" else OPTIMIZERS))
    precision = "fp16" if kind == "scaler" else dice.choice(["32-true", "32-true", "bf16-mixed", "fp16", "64-true"])
    if optimizer == "fused" and precision == "fp16":
        optimizer = "adamw"
    accumulate = 1 if by_hand else dice.choice([1, 1, 2, 4])
    moment = dice.choice(_moments(kind, accumulate))
    companions = [one for one in COMPANIONS if dice.random() < 0.3 and not (by_hand and one == "weight averaging")]
    if moment == "save" and "last good" in companions:
        companions.remove("last good")  # which saves more often, so that another save would be struck
    if moment == "save" and "checkpoint" not in companions:
        companions.append("checkpoint")
    every = dice.choice([2, 4, 8])
    average = dice.choice([one for one in AVERAGES if one != "none" or kind != "average"])
    if task == "transformer" and average != "none":
        task = "gru"  # an average of −inf, which its mask holds, is NaN
    if average != "none" and precision == "64-true":
        precision = "32-true"  # Lightning's averages have 32 bits, to which each validation then rounds the weights
    return Draw(
        seed=dice.randrange(1 << 30),
        kind=kind,
        value=_value(kind, dice),
        at=_at(moment, kind, accumulate, every, dice),
        lasting=kind in ("input", "target") or dice.random() < 0.6,
        moment=moment,
        task=task,
        optimizer=optimizer,
        schedule="constant" if by_hand else dice.choice(list(SCHEDULES)),
        average=average,
        accumulate=accumulate,
        clip=None if by_hand or optimizer == "fused" else dice.choice([None, None, 0.5]),
        precision=precision,
        mode=mode,
        companions=tuple(companions),
        readback=dice.choice(["auto", "step", "deferred"]),
        act_on=dice.choice(["certain", "certain", "evidence"]),
        every=every,
        first=dice.random() < 0.5,
    )


def _tasks(kind: str) -> list[str]:
    # Tokens, and the classes that most tasks predict, are integers.
    if kind == "input":
        return [name for name in MODELS if name not in ("transformer", "embedding")]
    if kind == "target":
        return ["regression", "nll", "embedding"]
    return ["cnn"] if kind == "buffer" else list(MODELS)


def _moments(kind: str, accumulate: int) -> list[str]:
    if kind == "none":
        return ["any"]
    left_out = set() if accumulate > 1 else {"accumulation"}
    if kind not in (*IN_STATE, "loss", "exception"):
        left_out.add("validation")
    if kind not in (*IN_STATE, "exception"):
        left_out.add("save")
    return [one for one in MOMENTS if one not in left_out]


def _value(kind: str, dice: random.Random) -> str:
    if kind == "none":
        return "nothing"
    return dice.choice(["RuntimeError", "OSError"]) if kind == "exception" else dice.choice(NUMBERS)


def _at(moment: str, kind: str, accumulate: int, every: int, dice: random.Random) -> int:
    total = EPOCHS * BATCHES
    match moment:
        case "first":
            # There is no moment, and no average of anything, before the first update.
            return accumulate if kind in ("moment", "average") else 0
        case "accumulation":
            return accumulate * dice.randrange(1, total // accumulate) + dice.randrange(accumulate - 1)
        case "last":
            return dice.choice([BATCHES, total]) - 1
        case "pending":
            update = every * dice.randrange(1, max(2, total // accumulate // every)) + dice.randrange(2)
            return min(total - 1, accumulate * update)
    return dice.randrange(2 * accumulate, total)

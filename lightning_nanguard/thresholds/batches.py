"""How many batches are kept, and when one is strange."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = [
    "BatchUndoThresholds",
    "BatchesThresholds",
    "HealthyBatchesThresholds",
    "MicroBatchesThresholds",
    "RandomStreamsThresholds",
    "RepeatedStepsThresholds",
]


@dataclass(frozen=True)
class MicroBatchesThresholds:
    """How many micro-batches are kept with their random state, to be run again as they were.

    Attributes:
        updates: Updates kept where each update is read before it is made.
        updates_late: Updates kept where a reading may be two updates late.
        updates_examined: Updates kept where a loss that does not move is examined.
        updates_small: Updates kept for an examination where batches are small: eight of them would say little.
        small: Samples up to which a batch is small.
        per_update: Micro-batches of one update that are kept, the newest ones; more would only hold memory.
        most_bytes: Bytes that all of them may hold, beside the newest one, which the loop holds anyway. Batches of
            which three do not fit are too large to be kept longer as healthy ones, too.
    """

    updates: int = 1
    updates_late: int = 4
    updates_examined: int = 8
    updates_small: int = 256
    small: int = 4
    per_update: int = 8
    most_bytes: int = 256 << 20


@dataclass(frozen=True)
class HealthyBatchesThresholds:
    """How many healthy batches are kept, and when another one is strange beside them.

    Attributes:
        most: Batches kept. Four choose a learning rate far better than one does (97 % against 91 % of 130 tries); more
            than four are hardly better.
        most_bytes: Bytes that these batches may hold together.
        measured_every: Batches after which their size is measured again. Batches of a run are of similar size, and
            measuring each would cost more than keeping it.
        strange_factor: Factor on the largest number in all other batches, above which a batch is strange.
        extreme_factor: Factor on that number, above which a batch may be skipped without further evidence if its
            gradient is far too large, too.
        least_compared: Batches needed to tell a strange one.
    """

    most: int = 4
    most_bytes: int = 64 << 20
    measured_every: int = 16
    strange_factor: float = 100.0
    extreme_factor: float = 1e4
    least_compared: int = 2


@dataclass(frozen=True)
class BatchUndoThresholds:
    """What is copied before a batch, so that the batch can be undone.

    Attributes:
        copied_bytes: Bytes up to which a buffer is copied before every batch; a larger one is once it was seen to
            change.
        modules_counted_every: Batches after which the modules are listed again: to go through them before each batch
            costs more than to copy the buffers.
    """

    copied_bytes: int = 1 << 16
    modules_counted_every: int = 64


@dataclass(frozen=True)
class RandomStreamsThresholds:
    """Which steps are checked for the random streams they draw from.

    Attributes:
        checked_every: Steps after which one more is checked, beside those whose number is a power of two. A check takes
            80 µs, most of it for NumPy's stream.
        quiet_checks: Checked steps in a row without a draw after which a stream is no longer remembered before steps.
    """

    checked_every: int = 256
    quiet_checks: int = 4


@dataclass(frozen=True)
class RepeatedStepsThresholds:
    """What is remembered before a step so that it can be run again, and when it is.

    Attributes:
        checked_every: Steps after which it is checked what one changes beside the gradients; steps whose number is a
            power of two are checked, too.
        copied_items: Items up to which a list, dictionary or set among the module's attributes is copied before each
            step; of a longer list only the length is kept.
        copied_bytes: Bytes up to which a tensor or array among the attributes is copied before each step, once it was
            seen to be written in place.
        copied_bytes_rarely: Bytes up to which tensors and arrays among them are copied together where batches are run
            again beside the run, which is rare.
        reached_objects: Objects that are looked at beside the modules, for what a step can change through them.
        depth: Levels of nested containers of a batch, and of what the module's attributes hold, that are restored
            before a batch is run again.
        window_bytes: Bytes up to which the batches of a window of accumulation are kept until its end.
        test_device: Number of transient faults at one place from which on the device is suspected.
        message: Characters of an exception's text that are recorded.
        bytes_again: Bytes that the batches since the last certified snapshot may hold, to make their updates again
            where the state goes bad by itself.
        updates_again: Updates up to which this is done; more would take too long. 0 does without.
        measured_every: Updates after which the size of one is measured again.
        same_losses: Losses that must be the bits seen the first time before another one may differ: the second one
            shows that a whole update was made again as it was.
        squared: Gradient norm from which on the square of a gradient overflows in moments of 32 bits. An update that is
            bad below it is the optimizer's doing.
        gone_below: Share of a bad update's gradient norm below which it is no longer bad when it is made again.
    """

    checked_every: int = 256
    copied_items: int = 256
    copied_bytes: int = 1 << 16
    copied_bytes_rarely: int = 1 << 24
    reached_objects: int = 1024
    depth: int = 3
    window_bytes: int = 256 << 20
    test_device: int = 3
    message: int = 200
    bytes_again: int = 64 << 20
    updates_again: int = 512
    measured_every: int = 16
    same_losses: int = 2
    squared: float = 1e18
    gone_below: float = 0.5


@dataclass(frozen=True)
class BatchesThresholds:
    """How many batches are kept, and when one is strange.

    Attributes:
        micro_batches: Micro-batches kept to be run again.
        healthy: Healthy batches kept.
        undo: What is copied before a batch.
        random: When random streams are remembered before a step.
        repeated: What else is remembered before a step, and when a step is run again.
    """

    micro_batches: MicroBatchesThresholds = field(default_factory=MicroBatchesThresholds)
    healthy: HealthyBatchesThresholds = field(default_factory=HealthyBatchesThresholds)
    undo: BatchUndoThresholds = field(default_factory=BatchUndoThresholds)
    random: RandomStreamsThresholds = field(default_factory=RandomStreamsThresholds)
    repeated: RepeatedStepsThresholds = field(default_factory=RepeatedStepsThresholds)

"""How many batches are kept, and when the numbers of a batch are strange."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = [
    "BatchesThresholds",
    "HealthyBatchesThresholds",
    "MicroBatchesThresholds",
    "RepeatedStepsThresholds",
]


@dataclass(frozen=True)
class MicroBatchesThresholds:
    """How many micro-batches are kept with their random state, to be run again as they were.

    Attributes:
        updates_examined: Updates kept if a loss that does not move is examined.
        updates_small: Updates kept for an examination if batches are small, because eight small batches say little.
        small: Largest number of samples of a small batch.
        per_update: Micro-batches of one update that are kept, the newest ones.
        most_bytes: Bytes that all of them may hold, apart from the newest one, which the loop holds anyway. If three
            batches do not fit, no healthy batches are kept either.
    """

    updates_examined: int = 8
    updates_small: int = 256
    small: int = 4
    per_update: int = 8
    most_bytes: int = 256 << 20


@dataclass(frozen=True)
class HealthyBatchesThresholds:
    """How many healthy batches are kept, and when the numbers of another batch are strange compared with them.

    Attributes:
        most: Batches kept. Four choose a learning rate far better than one does (97 % against 91 % of 130 tries); more
            than four are hardly better.
        most_bytes: Bytes that these batches may hold together.
        strange_factor: Factor on the largest number in all other batches. A batch with a larger number is strange.
        extreme_factor: Factor on the same number. A batch with a number above it may be skipped without further
            evidence if its gradient is far too large, too.
        least_compared: Fewest batches with which a batch is compared.
    """

    most: int = 4
    most_bytes: int = 64 << 20
    strange_factor: float = 100.0
    extreme_factor: float = 1e4
    least_compared: int = 2


@dataclass(frozen=True)
class RepeatedStepsThresholds:
    """What is stored before a step so that the step can be undone or run again, and when this is done.

    Attributes:
        checked_every: Steps after which the guard checks again what a step changes besides the gradients, and which
            random streams it draws from (80 µs). Steps whose number is a power of two are checked, too.
        quiet_checks: Checked steps in a row without a draw, after which a random stream is no longer stored before
            steps.
        modules_counted_every: Batches after which the modules are listed again. To list them before each batch would
            cost more than to copy the buffers.
        copied_items: Largest number of items of a list, dictionary or set among the module's attributes that is copied
            before each step. Of a longer list only the length is stored.
        copied_bytes: Largest size of a buffer that is copied before each step, and of a tensor or array among the
            attributes once it was seen to be written in place. A larger buffer is copied only after it was seen to
            change.
        copied_bytes_rarely: Largest size of all tensors and arrays among the attributes together that are copied when
            batches are run again beside the run, which is rare.
        reached_objects: Objects besides modules that are examined, because a step may change something through them.
        depth: Levels of nested containers of a batch, and of what the module's attributes hold, that are restored
            before a batch is run again.
        window_bytes: Bytes up to which the micro-batches of a window of accumulation are kept until its end.
        test_device: Number of transient faults at one place at which the device is suspected.
        bytes_again: Bytes up to which the batches since the last certified snapshot are kept, to make their updates
            again if the state goes bad by itself.
        updates_again: Largest number of updates that are made again in this case; more would take too long. With 0 none
            are.
        measured_every: Updates after which the size of their batches is measured again. Batches of a run are of similar
            size, and to measure each would cost more than to keep it.
        same_losses: Losses that must have the same bits as the first time before another one may differ. The second one
            shows that a whole update was made again exactly.
        squared: Gradient norm above which the square of a gradient overflows in 32-bit moments. If an update with a
            smaller norm gives bad state, the optimizer is the cause.
        gone_below: Share of the gradient norm of a bad update. If its norm is below this share when it is made again,
            it is no longer bad.
    """

    checked_every: int = 256
    quiet_checks: int = 4
    modules_counted_every: int = 64
    copied_items: int = 256
    copied_bytes: int = 1 << 16
    copied_bytes_rarely: int = 1 << 24
    reached_objects: int = 1024
    depth: int = 3
    window_bytes: int = 256 << 20
    test_device: int = 3
    bytes_again: int = 64 << 20
    updates_again: int = 512
    measured_every: int = 16
    same_losses: int = 2
    squared: float = 1e18
    gone_below: float = 0.5


@dataclass(frozen=True)
class BatchesThresholds:
    """How many batches are kept, and when the numbers of a batch are strange.

    Attributes:
        micro_batches: Micro-batches kept to be run again.
        healthy: Healthy batches kept.
        repeated: What is stored before a step, and when a step is run again.
    """

    micro_batches: MicroBatchesThresholds = field(default_factory=MicroBatchesThresholds)
    healthy: HealthyBatchesThresholds = field(default_factory=HealthyBatchesThresholds)
    repeated: RepeatedStepsThresholds = field(default_factory=RepeatedStepsThresholds)

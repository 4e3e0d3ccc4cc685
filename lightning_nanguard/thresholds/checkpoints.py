"""What of a run is saved and rewound, and how a bad checkpoint is described."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckpointsThresholds:
    """What of a run is saved and rewound, and how a bad checkpoint is described.

    Attributes:
        averaged_copy_share: Share (0 to 1) of the trained elements that the tensors of a callback must cover to count
            as an averaged copy of the module, which a rollback restores. An average of the part that is fine-tuned
            covers most of them. A user's own tensors with the shapes of some layers do not.
        copies_looked_at_every: Batches after which the guard checks whether copies of the weights in callbacks are
            averages. Averages change in nearly every batch.
        tensors_named: Number of bad tensors that an error names before it says how many more there are.
    """

    averaged_copy_share: float = 0.5
    copies_looked_at_every: int = 16
    tensors_named: int = 5

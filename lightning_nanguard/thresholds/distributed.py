"""How long ranks wait, and what they share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DistributedThresholds:
    """How long ranks wait, and what they share.

    Attributes:
        patience: Seconds that a rank waits for a message of another rank. gloo's collectives wait equally long.
        seconds_to_connect: Seconds in which the processes of a machine must connect to each other when a fit begins.
        seconds_for_rest: Seconds that the rest of a message may take after its first bytes.
        unread_messages: Messages of another rank that may wait in its socket before they are read early. A socket holds
            several times as many, so that sending never blocks.
        min_split_bytes: Smallest tensor that is split in a shared snapshot. To join smaller ones would cost more than
            their memory.
        outlier_loss_ratio: A finite loss of a rank stands out if it is more than this many times that of any other
            rank.
    """

    patience: float = 1800.0
    seconds_to_connect: float = 5.0
    seconds_for_rest: float = 5.0
    unread_messages: int = 16
    min_split_bytes: int = 1024
    outlier_loss_ratio: float = 10.0

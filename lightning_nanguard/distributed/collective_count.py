"""Counts the collectives of the default process group."""

from __future__ import annotations

from torch import distributed


def collectives_begun() -> int:
    """Number of collectives that this process has begun on the default group, by anyone; 0 without a group.

    Two readings show whether code between them communicates, such as a synchronised batch norm, a loss over all ranks,
    or a value that is logged with ``sync_dist=True``.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0
    group = distributed.distributed_c10d._get_default_group()
    return int(group._get_sequence_number_for_group())  # type: ignore[attr-defined]

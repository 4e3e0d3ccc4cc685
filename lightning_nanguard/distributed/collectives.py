"""Counts the collectives of the default process group, and forbids collectives in code that only some ranks run."""

from __future__ import annotations

from typing import Any, final

from torch import distributed
from torch.utils._python_dispatch import TorchDispatchMode


def collectives_begun() -> int:
    """Number of collectives that this process has begun on the default group, by anyone; 0 without a group.

    Two readings show whether code between them communicates, such as a synchronised batch norm, a loss over all ranks,
    or a value that is logged with ``sync_dist=True``.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0
    group = distributed.distributed_c10d._get_default_group()
    return int(group._get_sequence_number_for_group())  # type: ignore[attr-defined]


@final
class ForbidCollectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context in which a collective raises before it starts, so that no other rank waits for a rank that runs alone."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Raise for a collective, and run any other operation."""
        if func.namespace in ("c10d", "_c10d_functional"):
            raise RuntimeError(f"{func} was called while a batch is run again on one rank without the others")
        return func(*args, **(kwargs or {}))

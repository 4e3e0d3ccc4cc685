"""Forbids collectives in code that only some ranks run."""

from __future__ import annotations

from typing import Any, final

from torch.utils._python_dispatch import TorchDispatchMode


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

"""Forbids collectives for code that one rank runs while others may not."""

from __future__ import annotations

from typing import Any, final

from torch.utils._python_dispatch import TorchDispatchMode


@final
class Silent(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it a collective raises instead of being made: for what one rank runs while others may not."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let everything else through."""
        if func.namespace in ("c10d", "_c10d_functional"):
            raise RuntimeError(f"{func} while a batch is looked at again, which one rank does without the others")
        return func(*args, **(kwargs or {}))

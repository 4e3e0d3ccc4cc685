"""Names what keeps repeated updates from being used: an optimizer or a buffer that makes the state bad each time, or a
tensor that code outside of passes and steps has written to."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_nanguard.diagnosis.operation_trace import non_finite, storage_key, tensors_in, user_line
from lightning_nanguard.state.learner import StateKey, describe
from lightning_nanguard.state.restore import is_weight
from lightning_nanguard.state.snapshot import Snapshot


def update_in_words(module: nn.Module, optimizer: Optimizer, spoilt: str) -> str:
    """Describe an optimizer that makes a tensor bad, with the precision of its update.

    Args:
        module: The trained module.
        optimizer: The optimizer.
        spoilt: The tensor, in words that end with the name of the parameter.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> from torch.optim import AdamW
        >>> update_in_words(net, AdamW(net.parameters(), eps=0.0), "parameter weight")
        'AdamW (float32, eps 0.0), parameter weight'
    """
    name = spoilt.rpartition(" ")[2]
    parameter = dict(module.named_parameters()).get(name)
    about = [] if parameter is None else [str(parameter.dtype).removeprefix("torch.")]
    groups = (one for one in optimizer.param_groups if any(mine is parameter for mine in one["params"]))
    about += [f"eps {group['eps']}" for group in groups if "eps" in group]
    computed = f" ({', '.join(about)})" if about else ""
    return f"{type(optimizer).__name__}{computed}, {spoilt}"


def buffer_in_words(module: nn.Module, spoilt: str, run: Callable[[], object]) -> str:
    """Describe a buffer that a forward pass makes bad, with the line that writes it, if the line can be found.

    Args:
        module: The trained module.
        spoilt: The buffer, in words that end with its name.
        run: Runs the forward pass from a state in which the buffer is good.

    Example:
        >>> buffer_in_words(nn.Sequential(nn.BatchNorm1d(2)), "buffer 0.running_var", lambda: None)
        'buffer 0.running_var of BatchNorm1d'
    """
    name = spoilt.rpartition(" ")[2]
    owner = dict(module.named_modules()).get(name.rpartition(".")[0], module)
    buffer = dict(module.named_buffers()).get(name)
    write = None if buffer is None else _Write(buffer)
    if write is not None:
        with write:
            run()
    line = f" ({write.line})" if write is not None and write.line else ""
    return f"{spoilt} of {type(owner).__name__}{line}"


def written_outside(
    start: Snapshot, first: Snapshot, again: Snapshot, untrained: Container[StateKey] = ()
) -> str | None:
    """Name of a weight or buffer that changed in the run, and not when its updates were made again; ``None`` without.

    An example is a target network that a hook copies from the trained one every hundred updates. A single element
    does not count: memory corruption changes one, and is what repeated updates undo.

    Args:
        start: The snapshot that the updates were made from.
        first: The state that the run had reached.
        again: The state after the same updates were made again.
        untrained: Parameters whose bad numbers no update was made from, so that nothing is gained by the repetition.
    """
    for key, was in start.leaves.items():
        finite = key not in untrained
        if is_weight(key) and _differs(was, first.leaves.get(key), again.leaves.get(key), finite=finite):
            return describe(key)
    return None


def _differs(was: Any, first: Any, again: Any, *, finite: bool) -> bool:
    if not (isinstance(was, Tensor) and isinstance(first, Tensor) and isinstance(again, Tensor)):
        return False
    if not (was.shape == first.shape == again.shape) or any(one.layout != torch.strided for one in (was, first, again)):
        return False
    was, first, again = was.to(again.device), first.to(again.device), again
    moved = torch.equal(was, again) and int((first != was).sum()) > 1
    return moved and not (finite and not bool(torch.isfinite(first).all()))


@final
class _Write(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Finds the first operation that makes a buffer bad.

    Attributes:
        line: The line of the user's code that calls the operation; empty if none is found.
    """

    def __init__(self, buffer: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._buffer = buffer.detach()
        self._key = storage_key(buffer)
        self.line = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # The schema of batch norm does not say that it writes its statistics.
        if not self.line and any(storage_key(one) == self._key for one in tensors_in((args, kwargs))):
            self.line = user_line() if non_finite([self._buffer]) else ""
        return result

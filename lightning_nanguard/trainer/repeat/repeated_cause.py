"""Names the optimizer or the buffer that makes the state bad each time an update is repeated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer


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


def buffer_in_words(module: nn.Module, spoilt: str) -> str:
    """Describe a buffer that a forward pass makes bad, with the place of the code.

    Args:
        module: The trained module.
        spoilt: The buffer, in words that end with its name.

    Example:
        >>> buffer_in_words(nn.Sequential(nn.BatchNorm1d(2)), "buffer 0.running_var").partition(":")[0]
        'buffer 0.running_var of BatchNorm1d (batchnorm.py'
    """
    path = spoilt.rpartition(" ")[2].rpartition(".")[0]
    owner = dict(module.named_modules()).get(path, module)
    run: Any = getattr(owner, "training_step", owner.forward) if owner is module else owner.forward
    code = getattr(run, "__code__", None)
    line = "" if code is None else f" ({Path(code.co_filename).name}:{code.co_firstlineno})"
    return f"{spoilt} of {type(owner).__name__}{line}"

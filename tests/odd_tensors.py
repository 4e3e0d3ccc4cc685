"""Tensors of unusual kinds, and an optimizer that keeps its state in eight bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten


class EightBit(Tensor):
    """A wrapper subclass as torchao's optimizers keep: codes of eight bits and one scale, few operations, no norm."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> EightBit:  # noqa: PYI034
        made = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32, device=codes.device)
        made.codes, made.scale = codes, scale
        return made

    @classmethod
    def of(cls, values: Tensor) -> EightBit:
        scale = values.abs().max().clamp(min=1e-12) / 127
        return cls((values / scale).round().to(torch.int8), scale)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], *_: Any) -> EightBit:
        return EightBit(parts["codes"], parts["scale"])

    def dequantize(self) -> Tensor:
        return self.codes * self.scale

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"EightBit({tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten.detach.default, aten._to_copy.default):
            (self,) = args[:1]
            made = cls(*(func(part) for part in (self.codes, self.scale)))
            return return_and_correct_aliasing(func, args, kwargs or {}, made)
        if func is aten.copy_.default:
            live, source = args[:2]
            if isinstance(source, cls):
                live.codes.copy_(source.codes)
                live.scale.copy_(source.scale)
            else:
                made = cls.of(source)
                live.codes.copy_(made.codes)
                live.scale.copy_(made.scale)
            return live
        if func in (aten.lerp.Scalar, aten.sub.Tensor, aten.mul.Tensor):
            return func(*tree_map_only(cls, lambda one: one.dequantize(), args), **(kwargs or {}))
        raise NotImplementedError(f"{func} of EightBit")


class EightBitMomentum(Optimizer):
    """SGD with a momentum of eight bits."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = EightBit.of(torch.zeros_like(parameter))
                momentum = torch.lerp(state["momentum"], parameter.grad, 0.1)
                state["momentum"].copy_(momentum)
                parameter.sub_(momentum, alpha=group["lr"])
        return loss


class Tagged(Tensor):
    """A subclass with numbers of its own, as libraries that carry units or names beside them make."""


def _nested(layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=layout)


ODD: dict[str, Callable[[], Tensor]] = {
    "float8": lambda: torch.ones(4).to(torch.float8_e4m3fn),
    "sparse": lambda: torch.eye(4).to_sparse(),
    "csr": lambda: torch.eye(4).to_sparse_csr(),
    "bsr": lambda: torch.eye(4).to_sparse_bsr((2, 2)),
    "nested": lambda: _nested(torch.strided),
    "jagged": lambda: _nested(torch.jagged),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
    "meta": lambda: torch.ones(3, device="meta"),
    "eight bit": lambda: EightBit.of(torch.ones(3)),
    "tagged": lambda: torch.ones(3).as_subclass(Tagged),
    "mkldnn": lambda: torch.ones(3).to_mkldnn(),
}
"""Makes a tensor of each kind, of ones as far as that can be."""


@torch.no_grad()
def set_to_zero(tensor: Tensor) -> None:
    """Change all numbers of a tensor of any kind to zero, in place."""
    if isinstance(tensor, EightBit):
        tensor.codes.zero_()
    elif tensor.is_sparse:
        tensor._values().zero_()
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        tensor.values().zero_()
    elif tensor.is_quantized or tensor.dtype == torch.float8_e4m3fn:
        tensor.copy_(torch.zeros(tensor.shape))
    else:
        tensor.mul_(0)


QUIET = (
    "ignore:Sparse .* tensor support is in beta:UserWarning",
    "ignore:The PyTorch API of nested tensors is in prototype:UserWarning",
    "ignore:torch.quantize_per_tensor:UserWarning",
)

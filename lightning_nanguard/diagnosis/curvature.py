"""Measures the curvature of a batch's loss: products with its Hessian H, the largest stable rate, and eigenvalues.

Along a direction d the loss changes by −ε·gᵀd + ½ε²·dᵀHd, so it stops falling at ε = 2·gᵀd / dᵀHd and falls most at
half of that (Goodfellow, Bengio and Courville, "Deep Learning", 2016, section 4.3.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_nanguard.diagnosis.case import Curvature, Layer
from lightning_nanguard.diagnosis.gradient_trace import autograd_nodes
from lightning_nanguard.thresholds.diagnosis import DEFAULT, CurvatureThresholds

Vector = list[Tensor]
"""One tensor for each parameter, of its shape."""


@final
class Hessian:
    """The Hessian of a loss, as products with vectors: by double backward, or by finite differences if that fails.

    Args:
        step: Returns the loss with its graph. It must return the same loss for the same weights.
        parameters: The parameters to differentiate by. Finite differences change them and restore them bit for bit.
        difference: Relative size of a finite difference.

    Raises:
        ValueError: If the loss does not depend on the parameters.

    Example:
        >>> w = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> hessian = Hessian(lambda: (w.square() * torch.tensor([0.5, 50.0])).sum(), [w])
        >>> hessian.times([torch.tensor([1.0, 1.0])])[0].tolist()
        [1.0, 100.0]
    """

    def __init__(
        self,
        step: Callable[[], Tensor | None],
        parameters: Sequence[Tensor],
        difference: float = DEFAULT.curvature.difference,
    ) -> None:
        self._step = step
        self._difference = difference
        self._all = [parameter for parameter in parameters if parameter.requires_grad]
        try:
            self._graph: Vector | None = gradient_of(self._step(), self._all, create_graph=True)
            if any(
                node.name() == "torch::autograd::Error"
                for node in autograd_nodes(*(one.grad_fn for one in self._graph))
            ):
                # This function can be differentiated only once. A second derivative would silently ignore it.
                raise NotImplementedError
            self.gradient = [one.detach() for one in self._graph]
            # Attention kernels and compiled modules fail only at the second derivative.
            self._image: Vector | None = self._twice(self._graph, self.gradient)
        except (RuntimeError, NotImplementedError):
            self._graph = self._image = None
            self.gradient = gradient_of(self._step(), self._all)

    def times(self, vector: Vector) -> Vector:
        """The product Hv, in the shapes of the parameters."""
        return self._twice(self._graph, vector) if self._graph is not None else self._differences(vector)

    def of_gradient(self) -> Vector:
        """The product of H and the gradient, computed once."""
        if self._image is None:
            self._image = self.times(self.gradient)
        return self._image

    def along(self, direction: Vector | None = None) -> Curvature:
        """Slope and curvature along a direction, by default that of the gradient."""
        if direction is None:
            return Curvature(slope=dot(self.gradient, self.gradient), bend=dot(self.gradient, self.of_gradient()))
        return Curvature(slope=dot(self.gradient, direction), bend=dot(direction, self.times(direction)))

    def _twice(self, gradient: Vector, vector: Vector) -> Vector:
        # If the loss is linear in the weights, its gradient has no graph, and H is zero.
        pairs = [(one, v) for one, v in zip(gradient, vector, strict=True) if one.requires_grad]
        if not pairs:
            return [torch.zeros_like(parameter) for parameter in self._all]
        outputs, given = [one for one, _ in pairs], [v.to(one.dtype) for one, v in pairs]
        found = torch.autograd.grad(outputs, self._all, given, retain_graph=True, allow_unused=True)
        return _zero_filled(found, self._all)

    def _differences(self, vector: Vector) -> Vector:
        size = norm(vector)
        if size == 0 or not math.isfinite(size):
            return [torch.zeros_like(one) for one in vector]
        width = self._difference * (1 + norm(self._all)) / size
        ends: list[Vector] = []
        with values_kept(self._all) as before:
            for sign in (width, -width):
                with torch.no_grad():
                    for parameter, start, v in zip(self._all, before, vector, strict=True):
                        parameter.copy_(start + sign * v)
                ends.append(gradient_of(self._step(), self._all))
        return [(one - other) / (2 * width) for one, other in zip(*ends, strict=True)]


def curvature_along_update(
    step: Callable[[], Tensor | None],
    optimizer: Optimizer,
    named: Mapping[str, Tensor],
    thresholds: CurvatureThresholds = DEFAULT.curvature,
) -> tuple[Curvature, tuple[Layer, ...]] | None:
    """The curvature along an optimizer's next update, and the effect of this update on each weight matrix.

    It is ``None`` if the updates of the optimizer are not known, or the gradient is not finite.

    Args:
        step: Returns the loss with its graph, the same for the same weights.
        optimizer: The optimizer. Its state does not change.
        named: The trained parameters by name.
        thresholds: How to compute the curvature.
    """
    parameters = list(named.values())
    hessian = Hessian(step, parameters, thresholds.difference)
    moved = update_direction(optimizer, hessian.gradient, parameters)
    if moved is None or not math.isfinite(norm(moved)):
        return None
    rate, name = float(optimizer.param_groups[0]["lr"]), type(optimizer).__name__
    layers = tuple(
        Layer(path.rpartition(".")[0] or path, "", weight=weight, update=rate * norm([d]) / weight)
        for path, parameter, d in zip(named, parameters, moved, strict=True)
        if parameter.dim() > 1 and (weight := norm([parameter])) > 0
    )
    group = optimizer.param_groups[0]
    bare = ", without momentum," if group.get("momentum") or any(group.get("betas", ())[:1]) else ""
    if name != "SGD":
        return replace(hessian.along(moved), along=f"the updates of {name}{bare}"), layers
    found = hessian.along(moved if len(optimizer.param_groups) > 1 else None)
    found = replace(found, along=f"{found.along}{bare}")
    # Only a rate that looks low needs further products.
    if rate <= thresholds.low_rate:
        steep, top = steepest(hessian, thresholds.power_iterations)
        found = replace(found, steepest=steep)
        # The other directions matter only if the steepest one does not allow the rate.
        if rate * steep >= 2:
            found = replace(found, typical=typical(hessian, top))
    return found, layers


def update_direction(optimizer: Optimizer, gradient: Sequence[Tensor], parameters: Sequence[Tensor]) -> Vector | None:
    """The direction of an optimizer's update, for the rate of its first group and without momentum.

    It is known for SGD and for Adam, AdamW, RMSprop and Adagrad, which divide by a mean of squares. For other
    optimizers it is ``None``.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    first = float(optimizer.param_groups[0]["lr"])
    found: Vector = []
    for parameter, g in zip(parameters, gradient, strict=True):
        group = groups.get(id(parameter))
        if group is None:
            found.append(torch.zeros_like(g))
            continue
        scaled = _scaled_gradient(type(optimizer).__name__, group, optimizer.state.get(parameter, {}), g)
        if scaled is None:
            return None
        found.append(scaled * (float(group["lr"]) / first if first > 0 else 1.0))
    return found


def _scaled_gradient(name: str, group: dict[str, Any], state: dict[str, Any], g: Tensor) -> Tensor | None:
    if name == "SGD":
        return g
    # The mean includes this gradient, as in the update. Without it the mean may still be zero.
    square = g.square()
    if name in ("Adam", "AdamW", "NAdam", "RAdam"):
        beta = group["betas"][1]
        mean = _moving_mean(state.get("exp_avg_sq"), square, beta) / (1 - beta ** (float(state.get("step", 0)) + 1))
    elif name == "RMSprop":
        mean = _moving_mean(state.get("square_avg"), square, group["alpha"])
    elif name == "Adagrad":
        mean = square if (total := state.get("sum")) is None else total + square
    else:
        return None
    scaled: Tensor = g / (mean.sqrt() + group["eps"])
    return scaled


def _moving_mean(mean: Tensor | None, value: Tensor, keep: float) -> Tensor:
    return (1 - keep) * value if mean is None else keep * mean + (1 - keep) * value


def steepest(hessian: Hessian, products: int = DEFAULT.curvature.power_iterations) -> tuple[float, Vector]:
    """A lower bound of the eigenvalue largest in magnitude, and its direction, by power iteration from the gradient."""
    size = norm(hessian.gradient)
    vector = unit(hessian.gradient)
    value = 0.0
    for turn in range(products):
        known = turn == 0 and size > 0
        image = [one / size for one in hessian.of_gradient()] if known else hessian.times(vector)
        value = dot(vector, image)
        if not norm(image) > 0:
            break
        vector = unit(image)
    return value, vector


def typical(hessian: Hessian, top: Vector) -> float:
    """Magnitude of the curvature along a random direction that is orthogonal to ``top``."""
    draw = torch.Generator().manual_seed(0)  # leaves the random streams of the run unchanged
    probe = [torch.randn(one.shape, generator=draw, device=draw.device).to(one.device, one.dtype) for one in top]
    share = dot(probe, top)
    probe = unit([p - share * t for p, t in zip(probe, top, strict=True)])
    return abs(dot(probe, hessian.times(probe)))


def extreme_eigenvalues(hessian: Hessian, thresholds: CurvatureThresholds = DEFAULT.curvature) -> tuple[float, float]:
    """Smallest and largest eigenvalue, by SciPy's Lanczos method (``eigsh``).

    Raises:
        ModuleNotFoundError: If SciPy is not installed. It comes with the extra ``curvature``.

    Example:
        >>> w = torch.ones(20, requires_grad=True)
        >>> scales = torch.arange(-1.0, 19.0)
        >>> low, high = extreme_eigenvalues(Hessian(lambda: 0.5 * (scales * w.square()).sum(), [w]))
        >>> round(low, 2), round(high, 2)
        (-1.0, 18.0)
    """
    try:
        import numpy as np
        from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Eigenvalues of the Hessian need SciPy, which is not installed. Install it with the extra: "
            "pip install 'lightning-nanguard[curvature]'."
        ) from error
    shapes = [(one.shape, one.numel(), one.dtype, one.device) for one in hessian.gradient]
    size = sum(count for _, count, _, _ in shapes)

    def matvec(flat: Any) -> Any:
        whole = torch.from_numpy(np.ascontiguousarray(flat).reshape(-1))
        parts = torch.split(whole, [count for _, count, _, _ in shapes])
        vector = [
            part.reshape(shape).to(device, dtype) for part, (shape, _, dtype, device) in zip(parts, shapes, strict=True)
        ]
        return torch.cat([one.detach().reshape(-1).double().cpu() for one in hessian.times(vector)]).numpy()

    if size <= thresholds.dense_size:
        dense = np.stack([matvec(row) for row in np.eye(size)])
        values = np.linalg.eigvalsh((dense + dense.T) / 2)
        return float(values[0]), float(values[-1])
    operator = LinearOperator((size, size), matvec=matvec, dtype=np.float64)
    # Without a start vector, eigsh draws one from NumPy's global random stream.
    start = np.cos(np.arange(1, size + 1) ** 1.5)
    ends = []
    for which in ("SA", "LA"):
        try:
            found = eigsh(
                operator,
                k=1,
                which=which,
                v0=start,
                tol=thresholds.tolerance,
                maxiter=thresholds.restarts,
                return_eigenvectors=False,
            )
        except ArpackNoConvergence as error:
            found = error.eigenvalues
        ends.append(float(found[0]) if len(found) else math.nan)
    return ends[0], ends[1]


@contextmanager
def values_kept(parameters: Sequence[Tensor]) -> Iterator[Vector]:
    """Restore parameters bit for bit after the block, which may change them; yields their values."""
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        yield before
    finally:
        with torch.no_grad():
            for parameter, start in zip(parameters, before, strict=True):
                parameter.copy_(start)


def dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Inner product, summed in double precision."""
    pairs = zip(one, other, strict=True)
    return float(sum((a.detach().double() * b.detach().double()).sum().cpu() for a, b in pairs))


def norm(vector: Sequence[Tensor]) -> float:
    """The 2-norm over all tensors."""
    return math.sqrt(dot(vector, vector))


def unit(vector: Sequence[Tensor]) -> Vector:
    """The vector scaled to norm 1; a zero vector stays zero."""
    size = norm(vector)
    return [one / size if size > 0 else one for one in vector]


def gradient_of(loss: Tensor | None, parameters: Sequence[Tensor], *, create_graph: bool = False) -> Vector:
    """The gradient of a loss by each parameter, with zeros for parameters that it does not depend on.

    Args:
        loss: The loss with its graph.
        parameters: The parameters.
        create_graph: Whether the gradient can be differentiated again.

    Raises:
        ValueError: If the loss depends on no parameter.
    """
    if loss is None or not loss.requires_grad:
        raise ValueError("the step gave no loss that depends on the parameters.")
    found = torch.autograd.grad(loss.sum(), parameters, create_graph=create_graph, allow_unused=True)
    return _zero_filled(found, parameters)


def _zero_filled(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Vector:
    return [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]

"""Four losses that do not fall, for four reasons: a saddle point, a minimum, steps that are too large, and a model that
has learned everything. In a plot they look the same.

    python examples/flat_loss.py

With ``examine_after=64`` the guard examines a loss that has not fallen in 64 updates. It checks how large the gradient
is, whether it changes its direction after each step, and whether the loss falls in any direction (the smallest
eigenvalue of its Hessian). Needs ``pip install 'lightning-nanguard[curvature]'``.
"""

from __future__ import annotations

import torch
from common import pl, tell, train
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nanguard import NaNGuard


class Product(nn.Module):
    """A linear model as a product of two layers. Both begin at zero, so neither gets a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 1, bias=False))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)


def line() -> nn.Module:
    """One layer that begins at zero. Unlike ``Product``, it gets a gradient."""
    net = nn.Linear(8, 1)
    nn.init.zeros_(net.weight)
    nn.init.zeros_(net.bias)
    return net


class Fit(pl.LightningModule):
    """A net under plain SGD and a squared loss."""

    def __init__(self, net: nn.Module, lr: float) -> None:
        super().__init__()
        self.net = net
        self.lr = lr

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def data(kind: str) -> DataLoader[tuple[Tensor, ...]]:
    """128 inputs, for ``"common"`` correlated, and their targets: the sum, or a parabola, which no line fits."""
    source = torch.Generator().manual_seed(0)
    inputs = torch.randn(128, 8, generator=source)
    if kind == "common":
        inputs += 3 * torch.randn(128, 1, generator=source)
    targets = inputs.sum(1, keepdim=True)
    if kind == "parabola":
        targets = inputs[:, :1].square() - 1
    return DataLoader(TensorDataset(inputs, targets), batch_size=128)


def main() -> None:
    runs = {
        "two layers that begin at zero": (Product(), "linear", 0.05),
        "a linear model of a parabola": (line(), "parabola", 0.1),
        "steps that are too large": (line(), "common", None),
        "a linear model of linear data": (line(), "linear", 0.1),
    }
    for name, (net, kind, lr) in runs.items():
        pl.seed_everything(0, verbose=False)
        loader = data(kind)
        guard = NaNGuard(examine_after=64)
        losses = train(Fit(net, edge(loader) if lr is None else lr), loader, guard, max_epochs=200)
        print(f"{name}: loss {losses[0]:.3g}, after 100 steps {losses[100]:.3g}, in the end {losses[-1]:.3g}")
        tell(guard, at_most=1)
        if not guard.advice:
            print("  the guard found nothing")


def edge(loader: DataLoader[tuple[Tensor, ...]]) -> float:
    """The rate at which SGD neither converges nor diverges in the steepest direction: 2 / (largest eigenvalue)."""
    inputs = next(iter(loader))[0]
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1)
    return float(2 / torch.linalg.eigvalsh(2 * inputs.T @ inputs / len(inputs)).max())


if __name__ == "__main__":
    main()

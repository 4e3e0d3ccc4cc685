"""A linear model whose loss explodes at a learning rate of 0.001 and falls at 0.0001.

    python examples/linear_rate.py

The loss rises to billions, inf and NaN, although the rate looks small. The largest good rate depends on the data. Here
400 correlated inputs make the loss very steep in one direction. The guard goes back to good weights, names the largest
rate that this batch allows, and goes on at a lower one.
"""

from __future__ import annotations

import math

import torch
from common import pl, tell, train
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nanguard import NaNGuard


class Linear(pl.LightningModule):
    """One linear layer under plain SGD."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.layer = nn.Linear(400, 1)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.layer(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def data() -> DataLoader[tuple[Tensor, ...]]:
    """400 inputs with a large common part, so that they are correlated."""
    source = torch.Generator().manual_seed(0)
    common = 3 * torch.randn(1024, 1, generator=source)
    inputs = common + torch.randn(1024, 400, generator=source)
    targets = inputs @ torch.randn(400, 1, generator=source) / 20 + common
    return DataLoader(TensorDataset(inputs, targets), batch_size=64, generator=source, shuffle=True)


def main() -> None:
    for lr, guard in ((1e-4, None), (1e-3, None), (1e-3, NaNGuard())):
        pl.seed_everything(0, verbose=False)
        losses = train(Linear(lr), data(), guard, max_epochs=8)
        print(f"learning rate {lr:g}{', with NaNGuard()' if guard else ''}: {', '.join(map(told, losses[:40:5]))} …")
        print(f"  ends at {told(losses[-1])}")
        if guard is not None:
            print(f"  learning rate in the end: {lr * guard.lr_multiplier:.2g}")
            tell(guard)


def told(loss: float) -> str:
    return f"{loss:.3g}" if math.isfinite(loss) else str(loss)


if __name__ == "__main__":
    main()

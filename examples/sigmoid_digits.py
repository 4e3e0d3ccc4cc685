"""A multi-layer perceptron with sigmoids and a squared loss, on digits: it does not learn, and nothing is NaN.

    python examples/sigmoid_digits.py

Each sigmoid passes on at most a quarter of the gradient, so the first of eight layers gets almost none. If the model is
wrong with high confidence, the squared loss has almost no gradient. ``preflight=True`` reports both before the first
step. With ReLU and cross-entropy the same layers learn at the same learning rate.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from common import accuracy, pl, tell, train
from digits import DigitsDataModule
from torch import Tensor, nn

from lightning_nanguard import NaNGuard


class Perceptron(pl.LightningModule):
    """Eight layers of 32 units, with sigmoids and a squared loss, or ReLU and cross-entropy."""

    def __init__(self, *, sigmoid: bool) -> None:
        super().__init__()
        self.sigmoid = sigmoid
        sizes = [64] + 7 * [32]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.Sigmoid() if sigmoid else nn.ReLU()]
            if not sigmoid:
                nn.init.kaiming_normal_(layers[-2].weight)
        self.net = nn.Sequential(*layers, nn.Linear(32, 10), *([nn.Sigmoid()] if sigmoid else []))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, targets = batch
        if not self.sigmoid:
            return nn.functional.cross_entropy(self(images), targets)
        return (self(images) - nn.functional.one_hot(targets, 10)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


def main() -> None:
    for sigmoid in (True, False):
        pl.seed_everything(0, verbose=False)
        module, data, guard = Perceptron(sigmoid=sigmoid), DigitsDataModule(), NaNGuard(preflight=True)
        losses = train(module, data, guard, max_epochs=8)
        what = "sigmoids and a squared loss" if sigmoid else "ReLU and cross-entropy"
        print(f"{what}: loss {losses[0]:.3g} → {losses[-1]:.3g}, held-out accuracy {accuracy(module, data):.1%}")
        tell(guard)
        if not guard.advice:
            print("  the preflight found nothing")


if __name__ == "__main__":
    main()

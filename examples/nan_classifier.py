"""A classifier whose loss becomes NaN during the run. Its accuracy falls to 10 % and stays there.

    python examples/nan_classifier.py

The loss is the logarithm of a softmax that is written by hand. When the model is very confident, a probability is zero,
and its logarithm is −inf. One step later every weight is NaN, and argmax always returns 0. The guard skips such
batches, so that the weights stay good, and names the line. With torch's own ``cross_entropy`` the fault does not occur.
"""

from __future__ import annotations

import math

import torch
from common import accuracy, pl, tell, train
from digits import DigitsDataModule
from torch import Tensor, nn

from lightning_nanguard import NaNGuard


class Classifier(pl.LightningModule):
    """A perceptron with the loss written by hand, or torch's."""

    def __init__(self, *, by_hand: bool) -> None:
        super().__init__()
        self.by_hand = by_hand
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, targets = batch
        if not self.by_hand:
            return nn.functional.cross_entropy(self(images), targets)
        scores = self(images)
        exponentials = torch.exp(scores - scores.max(dim=1, keepdim=True).values)
        probabilities = exponentials / exponentials.sum(dim=1, keepdim=True)
        return -torch.log(probabilities)[torch.arange(len(targets)), targets].mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9)


def main() -> None:
    runs = (("by hand", True, None), ("by hand, with NaNGuard()", True, NaNGuard()), ("torch's own", False, None))
    for name, by_hand, guard in runs:
        pl.seed_everything(0, verbose=False)
        module, data = Classifier(by_hand=by_hand), DigitsDataModule()
        losses = train(module, data, guard, max_epochs=12)
        bad = next((batch for batch, loss in enumerate(losses) if not math.isfinite(loss)), None)
        when = "finite to the end" if bad is None else f"not finite from batch {bad} on"
        if bad is not None and math.isfinite(losses[-1]):
            when = f"not finite in {sum(not math.isfinite(loss) for loss in losses)} batches, which were skipped"
        print(f"loss {name}: {when}; held-out accuracy {accuracy(module, data):.1%}")
        if guard is not None:
            tell(guard)


if __name__ == "__main__":
    main()

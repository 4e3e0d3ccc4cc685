"""A generative adversarial network that learns points on a circle. Its data hold two bad rows.

    python examples/gan.py

Without the guard one bad batch makes the weights of the discriminator NaN, and then those of the generator. The guard
skips the bad updates of both optimizers. It works under manual optimization, too.
"""

from __future__ import annotations

import math

import torch
from common import pl, train
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_nanguard import NaNGuard


def network(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, outputs)
    )


class CircleGAN(pl.LightningModule):
    """A generator and a discriminator, each with its own optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = network(4, 2), network(2, 1)

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> dict[str, Tensor]:
        (real,) = batch
        generator, discriminator = self.optimizers()
        made = self.generator(torch.randn(len(real), 4))
        loss = nn.functional.softplus(-self.discriminator(real)) + nn.functional.softplus(
            self.discriminator(made.detach())
        )
        self.update(discriminator, loss.mean())
        self.update(generator, nn.functional.softplus(-self.discriminator(made)).mean())
        return {"loss": loss.detach().mean()}

    def update(self, optimizer: pl.core.optimizer.LightningOptimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.Adam(part.parameters(), lr=0.002, betas=(0.5, 0.99))
            for part in (self.generator, self.discriminator)
        ]


def circle(rows: int) -> Tensor:
    angles = 2 * math.pi * torch.rand(rows, generator=torch.Generator().manual_seed(0))
    return torch.stack((angles.cos(), angles.sin()), dim=1)


def main() -> None:
    points = circle(8192)
    points[[500, 2500]] = torch.tensor([math.nan, math.inf])[:, None]
    for guard in (None, NaNGuard()):
        pl.seed_everything(0, verbose=False)
        module = CircleGAN()
        train(module, DataLoader(TensorDataset(points), batch_size=64, shuffle=True), guard, max_epochs=5)
        with torch.no_grad():
            distance = (module.generator(torch.randn(1000, 4)).norm(dim=1) - 1).abs().mean()
        print(f"{'with NaNGuard()' if guard else 'no guard'}: mean distance from the circle {distance:.3f}")
        if guard is not None:
            rows = sorted({row for one in guard.interventions for row in one.finding.rows})
            print(f"  {len(guard.interventions)} updates skipped, because of rows {rows}")


if __name__ == "__main__":
    main()

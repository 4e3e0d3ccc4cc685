"""Half precision with attention scores that overflow: every update is skipped without a message.

    python examples/fp16.py

The largest number of float16 is 65,504, and here the attention scores exceed it. The loss is NaN, and nothing is
learned. The guard names the operation and its line, and ends the run after 64 bad updates. With the scores in float32
the model learns.
"""

from __future__ import annotations

import torch
from common import accuracy, pl, tell, train
from digits import DigitsClassifier, DigitsDataModule
from torch import Tensor

from lightning_nanguard import NaNGuard

MixedPrecision = pl.plugins.precision.MixedPrecision


class Attending(DigitsClassifier):
    """The classifier of digits, with attention among the rows of an image.

    Args:
        in_float32: Whether the scores of the attention are computed in float32.
    """

    def __init__(self, in_float32: bool) -> None:
        super().__init__(lr=0.02)
        self.in_float32 = in_float32
        self.query = torch.nn.Linear(8, 64)

    def forward(self, images: Tensor) -> Tensor:
        rows = images.unflatten(1, (8, 8))
        query = 100 * self.query(rows)  # far too large: the usual factor is 1 / sqrt(64)
        with torch.autocast("cpu", enabled=not self.in_float32):
            query = query.float() if self.in_float32 else query
            scores = query @ query.transpose(1, 2)
        return self.net((scores.float().softmax(dim=2) @ rows).flatten(1))


def main() -> None:
    for in_float32, guard in ((False, None), (False, NaNGuard()), (True, NaNGuard())):
        pl.seed_everything(0, verbose=False)
        module, data = Attending(in_float32), DigitsDataModule()
        # On a GPU, Trainer(precision="16-mixed") adds the GradScaler. On the CPU Lightning adds none.
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        losses = train(module, data, guard, max_epochs=4, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
        name = f"scores in {'float32' if in_float32 else 'float16'}, {'with NaNGuard()' if guard else 'no guard'}"
        print(f"{name}: {len(losses)} batches, loss {losses[-1]:.2f}, held-out accuracy {accuracy(module, data):.1%}")
        if guard is not None:
            tell(guard, at_most=1)


if __name__ == "__main__":
    main()

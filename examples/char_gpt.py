"""A character-level GPT whose learning rate is far too high: the loss stays finite, and the model learns little.

    python examples/char_gpt.py

The text is the help that comes with Python. The learning rate rises to a hundred times a good one. Without the guard
the loss ends far above that of the run at the good rate, and no number is NaN. With ``act_on="evidence"`` the guard
trains copies of the model at lower rates beside the run (a trial). One of them learns far more, and the run goes on
from this copy at its rate.
"""

from __future__ import annotations

import pydoc_data.topics

import torch
from common import pl, tell, train
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_nanguard import NaNGuard

CONTEXT, WIDTH, STEPS = 32, 48, 400


class Text(Dataset[Tensor]):
    """Pieces of the help text, as indices of its characters."""

    def __init__(self, pieces: int, seed: int) -> None:
        text = "".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))[:100_000]
        self.characters = sorted(set(text))
        self.indices = torch.tensor([self.characters.index(one) for one in text])
        self.starts = torch.randint(len(text) - CONTEXT - 1, (pieces,), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Tensor:
        start = int(self.starts[index])
        return self.indices[start : start + CONTEXT + 1]


class CharGPT(pl.LightningModule):
    """Two layers of a causal transformer.

    Args:
        characters: Number of different characters.
        peak: The highest learning rate of the schedule.
    """

    def __init__(self, characters: int, peak: float) -> None:
        super().__init__()
        self.peak = peak
        self.token, self.place = nn.Embedding(characters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters))
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def forward(self, indices: Tensor) -> Tensor:
        hidden = self.token(indices) + self.place(torch.arange(CONTEXT, device=indices.device))
        return self.head(self.layers(hidden, mask=self.mask, is_causal=True))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.peak)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (STEPS / 4)) ** 2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main() -> None:
    data = Text(STEPS * 8, seed=0)
    held_out = torch.stack(list(Text(256, seed=1)))
    runs = [
        ("a good rate", 0.003, None),
        ("100 times the rate", 0.3, None),
        ('100 times the rate, with NaNGuard(act_on="evidence")', 0.3, NaNGuard(act_on="evidence")),
    ]
    for name, peak, guard in runs:
        pl.seed_everything(0, verbose=False)
        module = CharGPT(len(data.characters), peak)
        train(module, DataLoader(data, batch_size=8, shuffle=True), guard, max_epochs=1)
        with torch.no_grad():
            print(f"{name}: held-out loss {module.training_step(held_out, 0):.2f}")
        if guard is not None:
            print(f"  {guard.summary()}")
            tell(guard)


if __name__ == "__main__":
    main()

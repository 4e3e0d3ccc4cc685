"""A recurrent recogniser under the CTC loss, on generated utterances."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.rescue.data import Batch, Split
from benchmarks.rescue.models import Task

SOUNDS, FRAMES, FEATURES, LONGEST = 8, 40, 16, 7


@lru_cache
def utterances() -> Split:
    """Four to seven sounds of three to six frames each, silence after them, noise over all; and what was said."""
    g = torch.Generator().manual_seed(30)
    shapes = torch.cat([torch.zeros(1, FEATURES), torch.randn(SOUNDS, FEATURES, generator=g)])
    count = 1100
    said = torch.randint(1, SOUNDS + 1, (count, LONGEST), generator=g)
    length = torch.randint(4, LONGEST + 1, (count,), generator=g)
    lasts = torch.randint(3, 6, (count, LONGEST), generator=g)
    which = (lasts.cumsum(1)[:, :, None] <= torch.arange(FRAMES)).sum(1)  # the sound each frame belongs to
    spoken = torch.cat([said, torch.zeros(count, 1, dtype=torch.long)], 1).gather(1, which.clamp_max(LONGEST))
    spoken[which >= length[:, None]] = 0
    frames = shapes[spoken] + 0.6 * torch.randn(count, FRAMES, FEATURES, generator=g)
    rows = (frames, said, length)
    return Split(tuple(t[100:] for t in rows), tuple(t[:100] for t in rows))


class Recogniser(nn.Module):
    """A convolution, a GRU in both directions, and logits over sounds and the blank."""

    def __init__(self, width: int = 80) -> None:
        super().__init__()
        self.conv = nn.Conv1d(FEATURES, width, 3, padding=1)
        self.recurrent = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.mix, self.head = nn.Linear(2 * width, 2 * width), nn.Linear(2 * width, SOUNDS + 1)

    def forward(self, x: Tensor) -> Tensor:
        h = functional.gelu(self.conv(x.transpose(1, 2)).transpose(1, 2))
        return self.head(functional.gelu(self.mix(self.recurrent(h)[0])))  # type: ignore[no-any-return]


def ctc(net: nn.Module, batch: Batch, n: int) -> Tensor:
    """CTC loss by sound."""
    frames, said, length = batch
    scores = net(frames).float().log_softmax(-1).transpose(0, 1)
    return functional.ctc_loss(scores, said, torch.full((len(said),), FRAMES), length)


TASKS: dict[str, Task] = {"ctc": Task(utterances, Recogniser, ctc, batch=16, steps=250)}

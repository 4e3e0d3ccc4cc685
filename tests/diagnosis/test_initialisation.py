"""Whether weights look as they were initialised."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_nanguard.diagnosis.initialisation import looks_untrained
from lightning_nanguard.thresholds.mistakes import MistakeThresholds

LIMITS = MistakeThresholds()

INITIALISED: list[tuple[str, Callable[[Tensor], object]]] = [
    ("torch", lambda weight: None),
    ("kaiming_normal", lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu")),
    ("kaiming_uniform", lambda weight: nn.init.kaiming_uniform_(weight, nonlinearity="relu")),
    ("xavier_uniform", nn.init.xavier_uniform_),
    ("xavier_normal", nn.init.xavier_normal_),
    ("normal", lambda weight: nn.init.normal_(weight, std=0.02)),
    ("zeros", nn.init.zeros_),
]


def layers() -> list[nn.Module]:
    return [nn.Linear(64, 48), nn.Conv2d(16, 32, 3), nn.LSTM(16, 32), nn.Linear(40, 40), nn.Bilinear(16, 16, 16)]


@pytest.mark.parametrize(("name", "how"), INITIALISED, ids=[row[0] for row in INITIALISED])
def test_usual_initialisations_are_known_and_training_is_seen(name: str, how: Callable[[Tensor], object]) -> None:
    """Weights look untrained as they are initialised, and no longer after a few steps of Adam's size."""
    torch.manual_seed(0)
    for layer in layers():
        weight = next(layer.parameters())
        if isinstance(layer, nn.LSTM) and name != "torch":
            continue
        how(weight.data)
        assert looks_untrained(weight, layer, LIMITS) is True, layer
        # Bounds are left at once; of a normal distribution only what changes its spread is seen.
        with torch.no_grad():
            weight += 0.05 * weight.std().clamp(min=0.1) * torch.randn_like(weight).sign()
            weight *= 2.2 if name.endswith("normal") else 1.0
        assert looks_untrained(weight, layer, LIMITS) is False, layer


def test_biases_and_normalisations() -> None:
    """Uniform biases and fresh normalisations look untrained; others look trained, and few numbers tell nothing."""
    torch.manual_seed(0)
    layer, norm = nn.Linear(64, 48), nn.LayerNorm(48)
    assert looks_untrained(layer.bias, layer, LIMITS) is True
    assert looks_untrained(norm.weight, norm, LIMITS) is True
    with torch.no_grad():
        layer.bias.normal_(std=0.02)
        norm.weight += 0.01 * torch.randn(48)
    assert looks_untrained(layer.bias, layer, LIMITS) is False
    assert looks_untrained(norm.weight, norm, LIMITS) is False
    small, slope = nn.Linear(3, 8), nn.PReLU()
    assert looks_untrained(small.weight, small, LIMITS) is None
    assert looks_untrained(small.bias, small, LIMITS) is None
    assert looks_untrained(slope.weight, slope, LIMITS) is None
    with torch.no_grad():
        small.bias.mul_(0.05)
    assert looks_untrained(small.bias, small, LIMITS) is False  # eight numbers hardly start so near 0


def test_equal_numbers_of_ones_own() -> None:
    """A scale of several equal numbers is as it was made; of a single number that cannot be told."""
    owner = nn.Module()
    assert looks_untrained(nn.Parameter(0.1 * torch.ones(16)), owner, LIMITS) is True
    assert looks_untrained(nn.Parameter(torch.tensor([0.25])), nn.PReLU(), LIMITS) is not True


def test_weight_normalisation() -> None:
    """Its directions tell whether a layer is untrained; its magnitudes are the norms of the rows, and tell nothing."""
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(64, 48))
    magnitudes, directions = layer.parametrizations.weight.parameters()
    assert looks_untrained(magnitudes, layer.parametrizations.weight, LIMITS) is None
    assert looks_untrained(directions, layer.parametrizations.weight, LIMITS) is True

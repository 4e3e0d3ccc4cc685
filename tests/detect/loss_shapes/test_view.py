"""What a loss shape is judged by."""

from __future__ import annotations

from lightning_nanguard.detect.loss_shapes.view import loss_unit
from tests.detect.loss_shapes.views import view


def test_the_newest_losses_end_with_the_one_to_judge() -> None:
    """Fewer are told where fewer are known; what was learned is measured from the untrained model's loss."""
    seen = view([2.0, 1.0, 0.5, 7.0], best=0.5)
    assert (seen.newest(2), seen.newest(9), seen.newest(1)) == ([0.5, 7.0], [2.0, 1.0, 0.5, 7.0], [7.0])
    assert seen.learned == 1.5


def test_loss_unit() -> None:
    """The size of the untrained model's loss, and never 0."""
    assert [loss_unit(first) for first in (2.0, -3.0, 0.0)] == [2.0, 3.0, 1e-12]

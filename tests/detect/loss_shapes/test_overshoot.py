"""An update that took the loss far above the untrained model's."""

from __future__ import annotations

from lightning_nanguard import Fault
from lightning_nanguard.detect.loss_shapes.overshoot import Rise, overshoot, rises
from lightning_nanguard.thresholds.detection import OvershootThresholds
from tests.detect.loss_shapes.views import view


def test_rises() -> None:
    """Two loss units above the untrained loss is a rise; a loss that began at 0 has no unit."""
    own = OvershootThresholds()
    assert [rises(loss, 2.0, own) for loss in (6.0, 6.1)] == [False, True]
    assert rises(1.0, -0.4, own)
    assert not rises(1.0, 0.0, own)
    assert rises(6.0, 2.0, OvershootThresholds(above=1.0))


def test_overshoot() -> None:
    """Once it is due it is a suspicion that the growth of the weights has to confirm, however low the loss is."""
    rise = Rise(step=4, height=9.0, due=12)
    assert overshoot(view([0.1], since=11), rise) is None
    message = "the loss rose to 9 after step 4; the untrained model's was 2"
    fault = Fault("overshoot", "learner", "loss", 0.1, message, since=4, certain=False, proof="growth")
    assert overshoot(view([0.1], since=12), rise) == fault

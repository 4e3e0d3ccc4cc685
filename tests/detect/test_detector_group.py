"""A detector that fails is told, and does not end the run."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import pytest

from lightning_nanguard import Detector, DivergingLoss, Fault, Limits, NonFinite, Reading
from lightning_nanguard.detect.detector_group import DetectorGroup
from tests.detect.readings import reading


class Returns(Detector):
    """Returns what no detector may."""

    def __init__(self, fault: Any = None, limits: Any = None) -> None:
        self.fault, self.own_limits = fault, limits

    def check(self, reading: Reading) -> Any:
        return self.fault

    def limits(self) -> Any:
        return self.own_limits


class Raises(Detector):
    """Raises in every method."""

    def check(self, reading: Reading) -> Fault | None:
        raise RuntimeError("check")

    def accept(self, reading: Reading) -> None:
        raise RuntimeError("accept")

    def rewind(self, step: int) -> None:
        raise RuntimeError("rewind")

    def dismiss(self, reading: Reading) -> None:
        raise RuntimeError("dismiss")

    def uneasy(self, reading: Reading) -> bool:
        raise RuntimeError("uneasy")

    def limits(self) -> Limits | None:
        raise RuntimeError("limits")

    def state_dict(self) -> dict[str, Any]:
        raise RuntimeError("state_dict")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        raise RuntimeError("load_state_dict")


def test_a_detector_that_raises_is_left_out_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever raises, the others are asked, and one warning names the class and shows the exception."""
    logged: set[str] = set()
    group = DetectorGroup([Raises(), NonFinite(3), Raises()], logged)
    alone = DetectorGroup([NonFinite(3)], set())
    overflow = reading(0, 1.0, math.inf, scaler_skips=True, loss_scale=64.0)
    with caplog.at_level(logging.WARNING, "lightning_nanguard"):
        for one in (group, alone):
            one.accept([reading(0), overflow, overflow])
        assert group.find(reading(1)) is None
        found, expected = group.find(overflow), alone.find(overflow)
        assert found is not None
        assert found == expected
        assert not group.uneasy(overflow)
        # Nothing is known of the limits of a detector that does not tell them: each reading is looked at.
        assert group.limits() == Limits(-math.inf, -math.inf)
        known = {"overflows": [0, 0], "scale": 64.0, "updated": True}
        assert group.state() == [["Raises", {}], ["NonFinite", known], ["Raises", {}]]
        group.load(group.state())
        group.dismiss(overflow)
        group.rewind(0)
        DetectorGroup([Raises()], logged).accept([overflow])
    assert group.state()[1] == ["NonFinite", {"overflows": [], "scale": 64.0, "updated": True}]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    message = caplog.records[0].getMessage()
    assert message.startswith(f"NaNGuard: accept() of the detector {__name__}.Raises raised RuntimeError: accept.")
    assert caplog.records[0].exc_info is not None


@pytest.mark.parametrize("returned", [True, False, "too high", 1.0], ids=repr)
def test_what_is_no_fault_is_an_error(returned: object) -> None:
    """Where check() returns something else than a fault or None, the error names the class and what it returned."""
    group = DetectorGroup([Returns(returned)], set())
    with pytest.raises(TypeError, match=rf"check\(\) of the detector {__name__}.Returns returned {returned!r}, a "):
        group.find(reading(0))


def test_what_are_no_limits_is_an_error() -> None:
    """Where limits() returns something else than limits or None, the error names the class and what it returned."""
    group = DetectorGroup([Returns(limits=(1.0, 2.0))], set())
    with pytest.raises(
        TypeError, match=rf"limits\(\) of the detector {__name__}.Returns returned \(1.0, 2.0\), a tuple"
    ):
        group.limits()


def test_the_strictest_limits_count() -> None:
    """Loss and norm have to lie below the limits of all detectors; without any there is nothing to look at."""
    assert DetectorGroup([Returns(limits=Limits(1.0, 9.0)), Returns(limits=Limits(2.0, 8.0))], set()).limits() == (1, 8)
    assert DetectorGroup([], set()).limits() == Limits(math.inf, math.inf)


def test_the_first_fault_counts_and_a_dismissal_is_for_all() -> None:
    """Detectors are asked in their order, and all of them are told of a false alarm."""
    fault = Fault("own", "batch", "loss")
    first, second = Returns(fault), Returns(Fault("other", "batch", "loss"))
    found = DetectorGroup([NonFinite(), first, second], set()).find(reading(0))
    assert found == fault

    class Dismissed(Returns):
        times = 0

        def dismiss(self, reading: Reading) -> None:
            self.times += 1

    one, other = Dismissed(), Dismissed()
    DetectorGroup([one, other], set()).dismiss(reading(0))
    assert (one.times, other.times) == (1, 1)


def test_saved_histories_go_to_detectors_of_the_same_class() -> None:
    """The n-th detector of a class takes up the n-th history of that class, whatever else is in either list."""
    saved = [["NonFinite", {"overflows": [1]}], ["Gone", {"a": 1}], ["NonFinite", {"overflows": [2]}]]
    group = DetectorGroup([DivergingLoss(), NonFinite(), NonFinite(), NonFinite()], set())
    group.load(saved)
    assert [state for name, state in group.state() if name == "NonFinite"] == [
        {"overflows": [1], "scale": math.inf, "updated": True},
        {"overflows": [2], "scale": math.inf, "updated": True},
        {"overflows": [], "scale": math.inf, "updated": False},
    ]

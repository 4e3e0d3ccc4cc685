"""The base class of detectors."""

from __future__ import annotations

import pytest

from lightning_nanguard import Detector, Fault, Reading
from tests.detect.readings import reading


class Never(Detector):
    """Defines only what has to be."""

    def check(self, reading: Reading) -> Fault | None:
        return None


def test_only_a_check_is_required() -> None:
    """Everything else of a detector does nothing by default: it is asked about each reading and objects to none."""
    detector, one = Never(), reading(0)
    detector.accept(one)
    detector.rewind(0)
    detector.dismiss(one)
    detector.load_state_dict(detector.state_dict())
    assert detector.check(one) is None
    assert not detector.uneasy(one)
    assert not detector.judges_line_search
    assert (detector.limits(), detector.state_dict()) == (None, {})


def test_a_detector_without_a_check_is_an_error() -> None:
    """It fails when it is made, not when it is asked."""

    class Nothing(Detector):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Nothing()  # type: ignore[abstract]

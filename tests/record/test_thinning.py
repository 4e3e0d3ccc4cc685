"""Which interventions are shown, and how."""

from __future__ import annotations

from lightning_nanguard.record.messages import tell, tell_again
from lightning_nanguard.record.thinning import Thinning
from tests.record.data import step


def test_all_of_them() -> None:
    """The first of a kind in full, each other one in one line, also stops of an observed run."""
    thinning = Thinning(everything=True)
    stops = [step(number, remedies=("stop",), applied=False) for number in range(3)]
    assert [thinning.shown(one) for one in stops] == [tell(stops[0]), *map(tell_again, stops[1:])]
    assert thinning.would_have_stopped


def test_few_of_many() -> None:
    """The count doubles from one that is shown to the next, for each kind apart."""
    thinning = Thinning(3)
    shown = [bool(thinning.shown(step(number))) for number in range(1, 13)]
    assert [number for number, one in enumerate(shown, start=1) if one] == [1, 2, 3, 6, 12]
    assert thinning.shown(step(13, fault="another")).count("\n") == 1

"""The benchmark of silent mistakes measures what it says it measures."""

from __future__ import annotations

import pytest

from benchmarks.diagnose import cost, silent
from benchmarks.diagnose.problems import Dice
from benchmarks.diagnose.silent import Drawn, named, said

pytestmark = pytest.mark.filterwarnings("ignore")


def test_models_are_drawn_from_others() -> None:
    """The same form has another model, made of layers that the first ones do not have."""

    def kinds(draw: type[Dice]) -> set[str]:
        modules = (silent.frozen_body(draw(f"{seed}")).module for seed in range(8))
        return {type(one).__name__ for module in modules for one in module.modules()}

    assert kinds(Drawn) - kinds(Dice) >= {"GroupNorm", "Bilinear"}


@pytest.mark.parametrize("others", [False, True])
def test_a_mistake_is_named_and_what_is_meant_is_not(others: bool) -> None:
    """A body that is frozen as it was initialised, and one that was trained before."""
    assert named(said(silent.frozen_body, 3, others=others)) == {"frozen_part"}
    assert named(said(silent.transfer, 3, others=others)) == set()


def test_after_the_first_updates_nothing_is_looked_at() -> None:
    """What looks on takes a share of the first updates, and none of those after them."""
    found = cost.cost("mlp")
    assert 0 < found.first < 0.5 * cost.UPDATES * found.step
    assert found.after == 0.0
    assert found.step > 0

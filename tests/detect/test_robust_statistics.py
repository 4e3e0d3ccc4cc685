"""Statistics that outliers hardly change."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_nanguard.detect.robust_statistics import falling, spread


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(-1e3, 1e3))
def test_spread_does_not_depend_on_where_the_values_lie(values: list[float], shift: float) -> None:
    """The spread of shifted values is that of the values."""
    assert spread([value + shift for value in values]) == pytest.approx(spread(values), abs=1e-6)


def test_a_fall_is_told_from_noise() -> None:
    """The newer half has to lie below the older one by more than the error that the noise leaves."""
    values = [2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0]
    assert falling(values, noise=0.0, errors=2.0)
    assert falling(values, noise=0.99, errors=2.0)
    assert not falling(values, noise=1.0, errors=2.0)
    assert not falling(values[::-1], noise=0.0, errors=2.0)

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.act.rates import recorded_rates


@pytest.fixture
def used() -> Iterator[list[float]]:
    """The rate of every group in every SGD update from here on, in order: the ``lr`` that ``torch.optim.sgd`` gets."""
    with recorded_rates() as rates:
        yield rates

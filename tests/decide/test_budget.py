"""A budget checks its bounds."""

from __future__ import annotations

import pytest

from lightning_nanguard import Budget


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_rollbacks": 0}, r"Budget\(max_rollbacks=0\)"),
        ({"window": 1.5}, r"Budget\(window=1.5\)"),
        ({"max_skip_share": 0.0}, r"Budget\(max_skip_share=0.0\)"),
    ],
)
def test_a_budget_checks_its_arguments(arguments: dict[str, float], message: str) -> None:
    """An argument out of range is named with its value."""
    with pytest.raises(ValueError, match=message):
        Budget(**arguments)  # type: ignore[arg-type]

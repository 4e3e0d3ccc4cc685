"""The guard inside other people's packages: collected by `make packages` only."""

from __future__ import annotations

import os

import pytest

pytest.register_assert_rewrite("tests.packages.package")

collect_ignore_glob = [] if os.environ.get("NANGUARD_PACKAGES") else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Warnings of the packages are theirs."""
    for item in items:
        if "packages" in item.path.parts:
            item.add_marker(pytest.mark.filterwarnings("default"))

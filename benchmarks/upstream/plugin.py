"""A pytest plugin that adds one callback to every Trainer, behind those that the test gives."""

from __future__ import annotations

import os
import shutil
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.trainer.connectors.callback_connector import _CallbackConnector

from lightning_nanguard import NaNGuard

VARIABLE = "NANGUARD_UPSTREAM"
"""Environment variable that names the callback: ``guard`` or ``empty``."""


class Empty(Callback):
    """Does nothing: what fails with it, too, fails for being one callback more."""


MAKE = {"guard": NaNGuard, "empty": Empty}


def pytest_configure(config: pytest.Config) -> None:
    """Let tests be collected without pytest-rerunfailures, whose marker some of them carry."""
    config.addinivalue_line("markers", "flaky: may be run again by pytest-rerunfailures, where it is installed")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown() -> None:
    """Take away the records of runs without a logger, before a fixture of theirs asks for a folder as it was."""
    shutil.rmtree("nanguard", ignore_errors=True)


@pytest.fixture(autouse=True)
def _callback_in_every_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    init = _CallbackConnector.on_trainer_init
    make = MAKE[os.environ[VARIABLE]]

    def init_with_ours(self: Any, callbacks: Any, *args: Any, **options: Any) -> None:
        given = [callbacks] if isinstance(callbacks, Callback) else list(callbacks or [])
        init(self, [*given, make()], *args, **options)

    monkeypatch.setattr(_CallbackConnector, "on_trainer_init", init_with_ours)

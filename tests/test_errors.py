"""Errors say what happened and carry what a program needs to go on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_nanguard.errors import BadCheckpointError, TrainingDivergedError, optional_module, require
from lightning_nanguard.types import Fault, Finding


def test_an_argument_out_of_its_range_is_named() -> None:
    """Class, argument, value and what was expected are in the message; a good value passes."""
    require(True, Path(), "depth", 1, "anything")
    with pytest.raises(ValueError, match=r"Fault\(depth=-1\): expected at least 0\."):
        require(False, Fault("odd", "batch", "loss"), "depth", -1, "at least 0")


def test_a_run_that_cannot_be_helped_says_why() -> None:
    """Fault, reason, what was tried, the state in the module and the cause are attributes."""
    fault, finding = Fault("odd", "learner", "loss"), Finding("dead_relu", 0.5)
    error = TrainingDivergedError("over", fault=fault, reason="r", tried=["a"], snapshot_step=3, finding=finding)
    assert (str(error), error.fault, error.reason, error.tried) == ("over", fault, "r", ("a",))
    assert (error.snapshot_step, error.finding) == (3, finding)


def test_a_bad_checkpoint_names_its_tensors() -> None:
    """Path, poisoned tensors and the good checkpoint that is offered are attributes."""
    error = BadCheckpointError("bad", Path("a.ckpt"), ["w"], Path("b.ckpt"))
    assert (str(error), error.path, error.tensors, error.offered) == ("bad", Path("a.ckpt"), ("w",), Path("b.ckpt"))


def test_a_module_that_is_not_installed_is_named_with_its_extra() -> None:
    """The error says what needs it, and how to install it."""
    assert optional_module("json", "This needs json", "json") is json
    with pytest.raises(
        ModuleNotFoundError, match=r"^This needs it, which is not installed: pip install 'light.*\[it\]'"
    ):
        optional_module("nanguard_has_no_such_module", "This needs it", "it")

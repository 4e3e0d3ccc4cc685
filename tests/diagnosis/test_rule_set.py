"""Diagnosis rules of a user's own: asked beside the built-in ones, and harmless."""

from __future__ import annotations

import functools
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.demos.boring_classes import BoringModel
from torch import nn

from lightning_nanguard import Advice, BadField, Case, Clues, Evidence, Fault, Finding, NaNGuard
from lightning_nanguard.diagnosis.rule_set import RuleSet, check_rules, rule_name
from lightning_nanguard.record.files import read_records
from tests.helpers import FaultAt, data_for, fit, folder_of, task

NAN = math.nan
BAD_INPUT = Case(
    Fault("non_finite_loss", "batch", "loss", NAN), Evidence(step=9), Clues(bad_fields=(BadField("0", (3,)),))
)


def sensor(case: Case) -> Finding | None:
    """Samples of a broken sensor: a rule of a user's own."""
    if not case.clues.bad_fields:
        return None
    return Finding("broken_sensor", 0.99, {"field": case.clues.bad_fields[0].field}, suggestion="Mask the sensor.")


class Guess:
    """A callable object: a guess of a confidence that can be chosen."""

    def __init__(self, confidence: float) -> None:
        self.confidence = confidence

    def __call__(self, case: Case) -> Finding | None:
        return Finding("a_guess", self.confidence)


def raises(case: Case) -> Finding | None:
    raise KeyError("column")


@pytest.mark.parametrize(
    ("rule", "causes"),
    [
        (sensor, ["broken_sensor", "non_finite_input"]),
        (Guess(0.98), ["a_guess", "non_finite_input"]),
        (Guess(0.5), ["non_finite_input", "a_guess"]),
        (lambda case: None, ["non_finite_input"]),
    ],
    ids=["surer", "as sure", "less sure", "silent"],
)
def test_the_surest_finding_wins(rule: Callable[[Case], Finding | None], causes: list[str]) -> None:
    """A user's rule stands beside the built-in ones; of equally sure findings the user's comes first."""
    rules = RuleSet([rule])
    assert [finding.cause for finding in rules.findings(BAD_INPUT)] == causes
    found = rules.diagnose(BAD_INPUT)
    assert found is not None
    assert found.cause == causes[0]


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("a bad sensor", "returned str 'a bad sensor'"),
        (True, "returned bool True"),
        (Finding("x", NAN), "confidence=nan, expected a number from 0 to 1"),
        (Finding("x", "high"), "confidence='high'"),  # type: ignore[arg-type]
        (Finding("x", 0.9, {"rate": torch.ones(1)}), r"evidence\['rate'\] of Tensor, expected a number or a string"),  # type: ignore[dict-item]
        (Finding("x", 0.9, samples=(0.5,)), "samples="),  # type: ignore[arg-type]
        (Finding(None, 0.9), "cause=None, expected a string"),  # type: ignore[arg-type]
    ],
)
def test_a_finding_that_is_none_is_named_once(returned: Any, said: str, caplog: pytest.LogCaptureFixture) -> None:
    """What a rule returns is checked; the error names the rule, what it returned and what is expected."""

    def odd(case: Case) -> Any:
        return returned

    rules = RuleSet([odd, sensor])
    for _ in range(3):
        assert [finding.cause for finding in rules.findings(BAD_INPUT)] == ["broken_sensor", "non_finite_input"]
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert "odd" in record.getMessage()
    assert re.search(said, record.getMessage())


def test_a_rule_that_raises_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    """It costs nothing but its own finding."""
    rules = RuleSet([raises, sensor])
    for _ in range(3):
        assert [finding.cause for finding in rules.findings(BAD_INPUT)] == ["broken_sensor", "non_finite_input"]
    (record,) = caplog.records
    assert f"the diagnosis rule {__name__}.raises raised KeyError: 'column'" in record.getMessage()


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ([Guess], r"<class '.*Guess'> is a class; write Guess\(\)"),
        ([sensor, 3], "3 is not callable"),
        ([lambda: None], "<lambda> cannot be called with one argument, the Case"),
        ([lambda case, more: None], "<lambda> cannot be called with one argument"),
        (sensor, "expected a list of functions"),
        ("sensor", r"NaNGuard\(rules='sensor'\): expected a list"),
    ],
)
def test_what_is_no_rule_fails_in_the_constructor(rules: Any, said: str) -> None:
    """The error names what was given, and says what to write."""
    with pytest.raises(TypeError, match=said):
        NaNGuard(rules=rules)


def test_functions_objects_and_partials_are_rules() -> None:
    """Whatever can be called with a case is a rule, and has a name for messages."""
    rules = (sensor, Guess(0.5), functools.partial(sensor), Guess(0.5).__call__)
    assert check_rules(list(rules)) == rules
    assert check_rules(None) == ()
    names = ["sensor", "Guess", "sensor", "Guess.__call__"]
    assert [rule_name(rule) for rule in rules] == [f"{__name__}.{name}" for name in names]


def test_rules_are_asked_at_faults_before_the_first_step_and_in_examinations(tmp_path: Path) -> None:
    """A user's cause is on record, and in advice; a rule that raises costs the run nothing."""
    seen: list[Case] = []

    def watches(case: Case) -> Finding | None:
        seen.append(case)
        return Finding("quiet_channel", 0.995) if case.course is not None else None

    class Asks(FaultAt):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            if batch_idx == 9:
                guard.examine()

    guard = NaNGuard(rules=[raises, sensor, watches], preflight=True)
    fit(task("mlp"), data_for("mlp", 12), guard, folder=tmp_path, callbacks=[Asks("input", NAN, 5)])
    (record,) = guard.interventions
    assert record.cause == "broken_sensor"
    assert record.finding == Finding("broken_sensor", 0.99, {"field": "0"}, suggestion="Mask the sensor.")
    assert [one.finding for one in read_records(folder_of(guard) / "interventions.jsonl")] == [record.finding]
    assert [(one.occasion, one.finding.cause) for one in guard.advice] == [("asked", "quiet_channel")]
    assert isinstance(guard.advice[0], Advice)
    assert [case.course is not None for case in seen] == [False, False, True]
    assert [case.fault.kind for case in seen] == ["no_fault", "non_finite_loss", "no_fault"]


def test_a_guard_with_rules_can_be_pickled() -> None:
    """A function that can be imported goes where the guard goes, as to the processes of a strategy."""
    assert pickle.loads(pickle.dumps(NaNGuard(rules=[sensor])))._arguments.rules == (sensor,)


@pytest.mark.filterwarnings("ignore")  # Lightning calls what jsonargparse deprecates
def test_rules_are_written_in_yaml(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function by its path, an object by its class and arguments."""
    monkeypatch.setattr("sys.argv", ["train.py"])
    rules = [f"{__name__}.sensor", {"class_path": f"{__name__}.Guess", "init_args": {"confidence": 0.4}}]
    callback = {"class_path": "lightning_nanguard.NaNGuard", "init_args": {"rules": rules}}
    options = {"trainer": {"callbacks": [callback], "logger": False, "accelerator": "cpu"}}
    cli = LightningCLI(BoringModel, run=False, save_config_callback=None, seed_everything_default=1, args=options)
    (guard,) = (one for one in cli.trainer.callbacks if isinstance(one, NaNGuard))
    first, second = guard._arguments.rules
    assert first is sensor
    assert isinstance(second, Guess)
    assert second.confidence == 0.4


def test_a_rule_sees_nothing_of_the_model() -> None:
    """A case holds numbers and words alone, so that a rule can change nothing."""
    with pytest.raises(AttributeError, match="cannot assign to field"):
        BAD_INPUT.fault = None  # type: ignore[misc, assignment]
    assert not isinstance(BAD_INPUT.model, nn.Module)

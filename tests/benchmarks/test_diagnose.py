"""The diagnosis benchmark measures what it says it measures."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.diagnose import __main__ as command
from benchmarks.diagnose.healthy import said_of
from benchmarks.diagnose.measuring import FORMS, Job, Seen, failing, measure
from benchmarks.diagnose.others import anomaly, nan_detector, overflow_hooks, place_right
from lightning_nanguard.diagnosis.rules import RULES

pytestmark = pytest.mark.filterwarnings("ignore")


def test_every_cause_has_three_forms() -> None:
    """Each rule has at least three kinds of failing runs."""
    forms = Counter(form.cause for form in FORMS.values())
    # Exceptions are named by the rule of what they are about, the others by the guard itself.
    others = {"invalid_learning_rate", "weights_moved_outside", "exception_from_non_finite"}
    # The benchmark runs batches again, so a cause is never unexplained.
    assert set(forms) == {rule.__name__ for rule in RULES} - {"unexplained"} | others
    assert min(forms.values()) >= 3
    assert len(FORMS) == sum(forms.values())


@pytest.mark.parametrize("name", ["log_of_zero/log_of_softmax", "saddle_point/all_zero", "wrong_gradient/wrong_sign"])
def test_a_run_depends_on_its_seed_alone(name: str) -> None:
    """The same seed is judged alike twice."""
    assert failing((name, 3)) == failing((name, 3))


def test_a_suspicion_that_a_trial_confirmed_is_looked_into() -> None:
    """The layer that the rate is too high for is named, and not the rate alone."""
    result = failing(("layer_update_abnormal/loud_body", 3))
    assert (result.said, result.place) == ("layer_update_abnormal", True)


@pytest.mark.parametrize("name", ["check_of_the_users", "distribution_that_validates", "anomaly_mode"])
def test_exceptions_are_named_by_what_they_are_about(name: str) -> None:
    """Cause, place and samples; the other tools do not end the benchmark where the user's code raises."""
    result = failing((f"exception_from_non_finite/{name}", 3))
    assert (result.said, result.place, result.samples) == (result.cause, True, True)


def test_what_other_tools_say_of_a_logarithm_in_a_module() -> None:
    """The hooks name the module whose output turned infinite; anomaly detection names a backward function."""
    form = FORMS["log_of_zero/log_of_softmax"]
    problem = form.draw(1)
    assert overflow_hooks(problem) == "net.head"
    assert place_right(problem, "net.head")
    assert not place_right(problem, "net.body")
    assert nan_detector(form.draw(1)) == "net.head"
    assert anomaly(FORMS["sqrt_at_zero/root_behind_where"].draw(1)) in ("(sqrt)", "(where)", "(mul)", "(abs)")


def test_the_hooks_see_a_bad_weight() -> None:
    """A weight that is NaN is named as such."""
    problem = FORMS["corrupted_state/nan_weight"].draw(2)
    assert place_right(problem, overflow_hooks(problem))


def test_a_healthy_run_is_left_alone() -> None:
    """Nothing is said of a healthy run."""
    assert said_of("plain:mlp/adam", 0) == []


def test_the_command_writes_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One row a cause and one for all; the file holds every run."""
    output = tmp_path / "diagnose.json"
    arguments = ["--cases", "non_finite_input/bad_label|dead_relu/dead_shallow", "--draws", "1", "--jobs", "1"]
    assert command.main([*arguments, "--seeds", "tune", "--healthy", "0", "--output", str(output)]) == 0
    written = json.loads(output.read_text())
    assert [(row["cause"], row["runs"], row["right"]) for row in written["rows"]] == [
        ("non_finite_input", 1, 1),
        ("dead_relu", 1, 1),
        ("all", 2, 2),
    ]
    assert "non_finite_input" in capsys.readouterr().out
    assert [*tmp_path.iterdir()] == [output]


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured before an interruption is kept, and only the rest is measured then."""
    made: list[str] = []

    def once(job: Job) -> Seen:
        if made == ["non_finite_input/bad_label"]:
            made.append("interrupted")
            raise KeyboardInterrupt
        made.append(job.form)
        return measure(job)

    monkeypatch.setattr(command, "measure", once)
    output = tmp_path / "diagnose.json"
    arguments = ["--cases", "non_finite_input/bad_label|wrong_gradient/wrong_sign", "--draws", "1", "--jobs", "1"]
    arguments += ["--seeds", "tune", "--healthy", "0", "--output", str(output)]
    with pytest.raises(KeyboardInterrupt):
        command.main(arguments)
    assert command.main([*arguments, "--resume"]) == 0
    assert made == ["non_finite_input/bad_label", "interrupted", "wrong_gradient/wrong_sign"]
    assert json.loads(output.read_text())["about"]["runs"] == 2

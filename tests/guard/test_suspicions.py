"""What the user is told of readings that are unusual, and did no harm."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_nanguard import Detector, Fault, NaNGuard, Reading
from lightning_nanguard.diagnosis.step_tracer import StepTrace
from lightning_nanguard.guard.context import Settings
from lightning_nanguard.guard.suspicions import Suspicions
from lightning_nanguard.types import ActOn, Evidence, Finding
from tests.guard.plain_loop import EVIDENCE, PlainLoop
from tests.helpers import Task, batches, fit, mlp, task

LEARNER = Fault("odd_loss", "learner", "loss", 9.0, "the loss is odd", certain=False, proof="trial")
CERTAIN = Settings(snapshot_every=4)
FAULT = Fault("loss_spike", "batch", "loss", 9.0, "the loss rose to 9", certain=False)


def trained(settings: Settings) -> tuple[PlainLoop, Suspicions]:
    loop = PlainLoop(settings=settings)
    loop.run(6)
    parts = loop.guard._parts
    return loop, Suspicions(loop.guard.context, loop, parts.investigator, parts.beside, parts.recorder)


@pytest.mark.parametrize(
    ("settings", "possible", "words"),
    [
        (CERTAIN, True, 'every number is finite. NaNGuard(act_on="evidence") would'),
        (CERTAIN, False, "and no trial can be made, because the batches of this run cannot be run again."),
        (replace(CERTAIN, observe=True), True, "and no trial can be made, because the guard only observes."),
        (EVIDENCE, True, "and no trial can be made."),
        (EVIDENCE, False, "and no trial can be made, because the batches of this run cannot be run again."),
    ],
    ids=["certain", "certain-hindered", "observing", "evidence", "evidence-hindered"],
)
def test_advice_says_what_was_seen_and_that_nothing_was_done(
    settings: Settings, possible: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says why no trial can be made, and points to trials only where one can. It is remembered, too, because it may
    explain a state that becomes bad later."""
    loop, suspicions = trained(settings)
    monkeypatch.setattr(loop, "trainable", lambda: possible)
    suspicions.advise(FAULT, Reading(6, 0, 9.0, 1.0), late=True)
    (advice,) = loop.advice
    assert (advice.cause, advice.evidence) == ("loss_spike", {"value": 9.0})
    assert advice.suggestion.startswith("the loss rose to 9. If the run diverges")
    assert words in advice.suggestion
    told = loop.guard.context.state.told
    assert told is not None
    assert told[0] == 6
    assert "step 6: the loss rose to 9; finite, so nothing was done" in told[1]


@pytest.mark.parametrize(("settings", "told"), [(CERTAIN, True), (EVIDENCE, False)], ids=["certain", "evidence"])
def test_a_loss_that_does_not_show_which_weights_are_better(
    settings: Settings, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives no reason for advice about the learner, and is not found out where no batch may be run for it. A batch
    with an unusual loss is told all the same, and so are weights that grew far."""
    loop, suspicions = trained(settings)
    trace = StepTrace(own_targets=True, writes=False, unused=frozenset())
    monkeypatch.setattr(loop, "step_trace", lambda: trace)
    suspicions.advise(LEARNER, Reading(6, 0, 9.0, 1.0), late=True)
    assert bool(loop.advice) == told
    assert (loop.guard.context.state.told is not None) == told
    suspicions.advise(FAULT, Reading(6, 0, 9.0, 1.0), late=True)
    assert [one.cause for one in loop.advice][told:] == ["loss_spike"]
    monkeypatch.setattr(suspicions.investigator, "growth", lambda: 1e3)
    monkeypatch.setattr(loop, "diagnose", lambda *_: Finding("learning_rate_too_high", 0.8))
    suspicions.advise(LEARNER, Reading(7, 0, 9.0, 1.0), late=True)
    assert loop.advice[-1].cause == "learning_rate_too_high"


def test_the_rate_of_an_earlier_peak_is_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that grew far are not blamed on the present rate where a higher one was used before."""
    loop, suspicions = trained(CERTAIN)
    [now] = loop.guard.context.rate.effective()
    loop.guard.context.state.rates.extend([(3, 1000 * now), (4, now)])
    told: list[Evidence] = []
    found = Finding("learning_rate_too_high", 0.8, suggestion="it was too high.")

    def diagnose(fault: Fault, evidence: Evidence, look: str, update: int) -> Finding:
        told.append(evidence)
        return found

    monkeypatch.setattr(loop, "diagnose", diagnose)
    monkeypatch.setattr(type(loop.guard._parts.investigator), "growth", lambda self: 20.0)
    suspicions.tell(LEARNER, Reading(6, 0, 9.0, 1.0), (6, 0, 5))
    [evidence] = told
    assert (evidence.first_lr, evidence.lr, evidence.highest_lr) == (now, now, 1000 * now)
    assert loop.advice[0].cause == "learning_rate_too_high"


class FindsAt(Detector):
    """Suspects the learner at some steps."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def check(self, reading: Reading) -> Fault | None:
        return LEARNER if reading.step in self.steps else None


@pytest.mark.parametrize(
    ("act_on", "words"),
    [("certain", 'NaNGuard(act_on="evidence") would'), ("evidence", "because the run ends before a trial would")],
)
def test_the_step_of_advice(act_on: ActOn, words: str, tmp_path: Path) -> None:
    """It is that of the state after the update, whether the advice is given before this update or after it."""
    guard = NaNGuard(act_on=act_on, detectors=[FindsAt(13)])
    fit(task(), batches(count=20), guard, folder=tmp_path)
    (advice,) = guard.advice
    assert (advice.global_step, advice.finding.place) == (13, "loss")
    assert words in advice.finding.suggestion


def test_which_of_several_optimizers(tmp_path: Path) -> None:
    """Advice names the one whose loss is meant, and does not point to trials, which such a run cannot have."""
    guard = NaNGuard(detectors=[FindsAt(25, 26)])
    fit(task("manual"), batches(count=20), guard, folder=tmp_path)
    assert [(one.global_step, one.finding.place) for one in guard.advice] == [
        (25, "the loss of optimizer 0"),
        (26, "the loss of optimizer 1"),
    ]
    for one in guard.advice:
        assert one.finding.suggestion.endswith("no trial can be made, because the run has several optimizers.")


@pytest.mark.parametrize(("runs", "words"), [(True, "a trial of lower learning rates is running"), (False, "no trial")])
def test_advice_beside_a_trial(runs: bool, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not say that no trial can be made while one is running."""
    loop, suspicions = trained(EVIDENCE)
    monkeypatch.setattr(type(suspicions.beside.trials), "running", property(lambda self: runs))
    suspicions.tell(LEARNER, Reading(6, 0, 2.0, 1.0), (6, 0, 5))
    assert words in loop.advice[0].suggestion


@pytest.mark.parametrize(
    ("above", "growth", "told"), [(2.0, 600.0, True), (2.0, 1.0, False), (-0.1, 600.0, False)], ids=str
)
def test_a_doubtful_suspicion_is_told_if_the_weights_show_its_cause(
    above: float, growth: float, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that a high rate has made huge, with a loss above the first one, are told between two checks, too."""
    loop, suspicions = trained(CERTAIN)
    monkeypatch.setattr(type(suspicions.investigator), "growth", lambda self: growth)
    history = loop.guard.context.monitors.history(0)
    assert history.first is not None
    loss = history.first + above
    fault = Fault("stuck_loss", "learner", "loss", loss, "it is high", certain=False, doubtful=True)
    suspicions.tell(fault, Reading(6, 0, loss, 1.0), (6, 0, 5))
    assert [one.cause for one in loop.advice] == (["learning_rate_too_high"] if told else [])


def test_a_trial_that_finds_nothing_better_is_told() -> None:
    """A loss that is clearly higher is told after such a trial, too, and a lower rate is not proposed then."""
    loop, suspicions = trained(EVIDENCE)
    suspicions.tell(LEARNER, Reading(6, 0, 2.0, 1.0), (6, 0, 5), tried=True)
    (advice,) = loop.advice
    assert "Look for what changed the weights or the data." in advice.suggestion
    assert advice.suggestion.endswith("and a trial found no lower learning rate at which the model learns more.")
    assert "with a lower learning rate" not in advice.suggestion


@pytest.mark.parametrize(("above", "told"), [(0.5, False), (5.0, True)])
def test_losses_within_their_noise_are_not_told(above: float, told: bool) -> None:
    """A loss that is above the first one by less than the newest losses differ is no sign of a divergence."""
    loop, suspicions = trained(Settings())
    history = loop.guard.context.monitors.history(0)
    assert history.first is not None
    for step in range(7, 23):
        loop.guard.context.monitors.accept(Reading(step, 0, history.first + step % 2, 1.0))
    fault = Fault("exploding_loss", "learner", "loss", history.first + above, "it rose", certain=False)
    suspicions.tell(fault, Reading(23, 0, history.first + above, 1.0), (23, 0, 22))
    assert bool(loop.advice) is told


def test_a_run_that_has_lost_all_that_it_had_learned_is_told() -> None:
    """Its loss is hardly above the first one, as where nothing can be learned. But this run had learned far more than
    its newest losses differ."""
    loop, suspicions = trained(Settings())
    history = loop.guard.context.monitors.history(0)
    assert history is not None
    assert history.first is not None
    for step in range(7, 39):
        low = 20.0 if step < 23 else 0.0
        loop.guard.context.monitors.accept(Reading(step, 0, history.first + step % 2 - low, 1.0))
    fault = Fault("collapsed", "learner", "loss", history.first + 0.5, "it is back", certain=False)
    suspicions.tell(fault, Reading(39, 0, history.first + 0.5, 1.0), (39, 0, 38))
    assert [one.cause for one in loop.advice] == ["collapsed"]


@pytest.mark.parametrize("act_on", ["certain", "evidence"])
@pytest.mark.parametrize("back", [True, False])
def test_a_loss_that_is_back_when_the_fit_ends(back: bool, act_on: ActOn, tmp_path: Path) -> None:
    """The checks come after 40, 80, 160, … updates. What has collapsed since then is told at the end, with the rate
    that has risen, and a run that has kept what it learned hears nothing."""

    def rising(optimizer: Optimizer) -> LambdaLR:
        return LambdaLR(optimizer, lambda step: 1 + step / 100)

    torch.manual_seed(0)
    data = [
        (x, y * 5 if at < 20 or (back and at >= 100) else y) for at, (x, y) in enumerate(batches(count=130, size=64))
    ]
    module, guard = Task(mlp(), lambda p: SGD(p, lr=1e-4), rising), NaNGuard(act_on=act_on, dirpath=tmp_path)
    fit(module, data, guard, folder=tmp_path)
    assert guard.interventions == ()
    if not back:
        assert guard.advice == ()
        return
    (advice,) = guard.advice
    assert (advice.finding.cause, advice.global_step) == ("collapsed", 130)
    assert "The learning rate has risen from 0.0001 to 0.00023: look at its schedule" in advice.finding.suggestion
    ended = "the fit ended before a trial could show more" if act_on == "evidence" else "NaNGuard(act_on="
    assert ended in advice.finding.suggestion


@pytest.mark.parametrize(("loss", "cause"), [(math.inf, "infinite_loss"), (math.nan, "nan_loss")])
@pytest.mark.parametrize("observe", [False, True])
def test_losses_that_are_never_finite(loss: float, cause: str, observe: bool) -> None:
    """The user is told how many there were in a row and, if the guard acts, that it lets them pass from now on."""
    loop, suspicions = trained(Settings(observe=observe))
    loop.guard.context.state.bad_alone = 6, 5
    suspicions.tell_of_bad_losses(Reading(6, 0, loss, 1.0, finite=False, loss_finite=False), late=False)
    (advice,) = loop.advice
    assert advice.cause == cause
    assert "the loss of 5 updates in a row is not finite" in advice.suggestion
    assert ("From now on the guard makes such updates" in advice.suggestion) is not observe


def test_a_known_cause_of_bad_losses_is_repeated() -> None:
    """The advice names the operation that was found for the first of them."""
    loop, suspicions = trained(Settings())
    found = Finding("log_of_zero", 0.9, {}, "training_step (log, net.py:7)", suggestion="log was given -1")
    loop.guard._parts.recorder.record(Fault("non_finite_loss", "batch", "loss"), ("skip",), [], found)
    suspicions.tell_of_bad_losses(Reading(6, 0, math.nan, 1.0, finite=False, loss_finite=False), late=False)
    assert loop.advice[0].suggestion.endswith("They come from training_step (log, net.py:7): log was given -1")


def test_gradients_that_are_always_too_large() -> None:
    """The advice says that this is true of all updates, and what to change."""
    loop, suspicions = trained(Settings())
    fault = Fault("gradient_overflow", "batch", "gradient", 1e25, "the norm is 1e25")
    suspicions.tell_of_large_gradients(fault, Reading(6, 0, 1.0, 1e25), late=False)
    (advice,) = loop.advice
    assert advice.suggestion.startswith("the norm is 1e25. The same is true of all 6 updates so far.")
    assert "multiply the loss by 1e-25. The learning rate of Adam" in advice.suggestion
    assert advice.suggestion.endswith("Divide that of SGD by the same number.")
    told = loop.guard.context.state.told
    assert told is not None
    assert "the norm is 1e25; as in all updates, so it was made" in told[1]

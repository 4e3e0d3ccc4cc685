"""A trial beside the run finds a rate that ruins, where batches are too large to keep enough of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from lightning_nanguard.guard.control import Control
from lightning_nanguard.guard.found import FoundFault
from lightning_nanguard.guard.trial import TrialRunner
from lightning_nanguard.state.snapshot import tensor_bytes
from lightning_nanguard.types import Fault, Reading
from tests.guard.branching import SUSPICION, BranchingLoop, branches, trial_runner
from tests.guard.plain_loop import nan_at, remedies, state
from tests.helpers import copied, differences


def with_trial(loop: BranchingLoop) -> tuple[TrialRunner, bool]:
    """A trial of a loop that has trained, and whether it began."""
    context = loop.guard.context
    trial = trial_runner(loop)
    certified = context.ring.certified
    return trial, trial.begin(SUSPICION, certified[-1], certified[0])


@pytest.mark.parametrize(("lr", "acts"), [(2.0, True), (0.05, False), (1e-5, False)])
def test_a_rate_that_ruins_is_found(lr: float, acts: bool) -> None:
    """At a rate far too high the run goes on from what a restart at a lower rate has learned meanwhile; at a good rate
    and at one that is too low nothing is done, and the run is the same bit by bit."""
    loop, alone = BranchingLoop(lr=lr), BranchingLoop(lr=lr, detectors=[])
    loop.run(250)
    assert bool(loop.records) == acts
    if not acts:
        alone.run(250)
        assert differences(copied(state(loop)), copied(state(alone))) == []
        return
    assert remedies(loop)[0] == ("restore", "scale")
    # The first suspicion comes after 40 updates, and a trial of a run that is plainly lost takes 32.
    assert loop.records[0].global_step == 72
    assert loop.guard.context.rate.ratio() < 1
    assert (loop.probe() or 0.0) < 0.1


def without_a_difference(*steps: int) -> Callable[[int, Tensor], None]:
    """Makes batches whose loss is the same under every state: it is at most 10."""

    def nothing(step: int, batch: Tensor) -> None:
        if step in steps:
            batch.fill_(1e6)

    return nothing


@pytest.mark.parametrize(("batches", "ends"), [(1, 72), (6, 104)])
def test_a_trial_ends_early_only_if_half_of_the_batches_say_so(batches: int, ends: int) -> None:
    """In ordered data a few batches may all be of one kind. If the other half of the ten batches that are judged early
    shows nothing, the trial goes on to its end."""
    loop = BranchingLoop(lr=2.0)
    loop.run(110, without_a_difference(*range(63, 63 + batches)))
    assert loop.records[0].global_step == ends


def test_a_trial_ends_once_the_arm_does_not_lead() -> None:
    """If the arm does not lead after half of the last 21 batches, the trial has shown enough."""
    loop = BranchingLoop(lr=0.05)
    loop.run(110)
    (given,) = loop.guard.context.trials.given
    # The first suspicion comes after 40 updates. The arm is compared from the 44th update of the trial on.
    assert (given.outcome, given.begun_step, given.global_step) == ("not confirmed", 40, 40 + 43 + 11)


def test_the_run_goes_on_from_an_arm_that_has_caught_up() -> None:
    """Earlier batches pick the arm that is compared with the run, and the newest ones the rate at which it goes on."""
    loop = BranchingLoop(lr=2.0)
    loop.run(83, without_a_difference(*range(63, 69)))  # the trial does not end early
    running = loop.guard._parts.beside.trials._running
    assert running is not None
    higher, lower = sorted((arm.factor for arm in running.arms), reverse=True)
    for arm in running.arms:
        arm.losses = [*arm.losses[:22], *([0.1] * 21 if arm.factor == lower else [2.0] * 21)]
    loop.run(20)
    for arm in running.arms:
        arm.losses[43:] = [0.1] * 20
    loop.run(1)
    assert loop.guard.context.rate.ratio() == pytest.approx(higher)


def test_a_run_that_goes_on_from_an_arm_keeps_its_first_loss() -> None:
    """What can be learned is measured from the loss of the untrained model, also after a rollback to the start."""
    loop = BranchingLoop(lr=2.0)
    loop.run(1)
    history = loop.guard.context.monitors.history(0)
    first = history.first
    loop.run(80)
    assert remedies(loop) == [("restore", "scale")]
    assert history.first == first


def test_after_a_peak_of_the_rate_the_best_state_goes_on() -> None:
    """A run that a peak of its rate has ruined continues at its own rate from what a copy of its best state has learned
    meanwhile. A trial that began within the peak ends with it."""
    loop = BranchingLoop(lr=0.05)

    def peak(step: int, batch: Tensor) -> None:
        loop.optimizer.param_groups[0]["lr"] = 2.0 if 100 <= step < 130 else 0.05

    loop.run(260, peak)
    assert remedies(loop) == [("restore",)]
    assert loop.guard.context.rate.ratio() == 1.0
    assert (loop.probe() or 0.0) < 0.1
    outcomes = [(one.outcome, one.factor) for one in loop.guard.context.trials.given]
    assert outcomes[:3] == [("not confirmed", 1.0), ("no result", 1.0), ("confirmed", 1.0)]
    assert "fell" in loop.guard.context.trials.given[1].reason


def test_what_ends_a_trial() -> None:
    """A skipped batch and a rollback to an earlier state do not, since the arms do not depend on the run; another
    learning rate does."""
    loop = BranchingLoop(lr=2.0)
    loop.run(50)
    assert loop.guard._parts.beside.trials.running
    loop.run(1, nan_at(50))
    with torch.no_grad():
        loop.net.weight.fill_(float("nan"))
    loop.run(3)
    assert "restore" in loop.records[-1].remedies
    assert loop.guard._parts.beside.trials.running
    loop.guard.context.rate.set_multiplier(0.5)
    loop.run(1)
    assert not loop.guard._parts.beside.trials.running


def test_a_plateau_is_tried_once_at_a_rate() -> None:
    """After a trial of a run that goes well none follows at its rate, but where that has risen or the guard has cut
    it; a resumed run knows of it."""
    plateau = Fault("stuck_loss", "learner", "loss", None, certain=False, doubtful=True)
    for multiplier, rate, begins in ((1.0, 0.05, False), (0.5, 0.05, True), (1.0, 0.2, True), (1.0, 0.01, False)):
        loop = BranchingLoop(lr=0.05)
        loop.run(150)
        certified, trials = loop.guard.context.ring.certified, loop.guard._parts.beside.trials
        known = trials.state_dict()
        trials.load_state_dict({})
        trials.load_state_dict(known)
        loop.optimizer.param_groups[0]["lr"] = rate
        loop.run(1)
        loop.guard.context.rate.set_multiplier(multiplier)
        loop.optimizer.param_groups[0]["lr"] = 0.05  # what was a peak counts as well
        assert not trials.running
        assert trials.begin(plateau, certified[-1], certified[0]) == begins


@pytest.mark.parametrize(("peak", "ended"), [(0.05, 1), (0.2, 2)])
def test_a_rate_that_the_run_has_survived_is_no_new_rate(peak: float, ended: int) -> None:
    """Under a cyclic schedule a trial tests what the rates until then have made of the run. Another trial of a run that
    goes well follows only if a later peak is far above all of them."""
    loop = BranchingLoop(lr=0.05)

    def cycle(step: int, batch: Tensor) -> None:
        high = 0.05 if step < 120 else peak
        loop.optimizer.param_groups[0]["lr"] = high if step % 30 == 15 else 0.005

    loop.run(340, cycle)
    assert loop.records == []
    assert sum(one.outcome == "not confirmed" for one in loop.guard.context.trials.given) == ended


@pytest.mark.parametrize(("rate", "begins"), [(0.05, False), (0.2, True)])
def test_a_trial_answers_what_is_asked_while_it_runs(rate: float, begins: bool) -> None:
    """A request during a trial leads to another one only if the rate is a new one since the trial began."""
    loop = BranchingLoop(lr=0.05, detectors=[])
    loop.run(40)
    certified, trials = loop.guard.context.ring.certified, loop.guard._parts.beside.trials
    assert trials.begin(SUSPICION, certified[-1], certified[0])
    loop.run(20)
    trials.pursue(FoundFault(SUSPICION, Reading(60, 0, 1.0, 1.0)), certified[-1], certified[0])
    loop.optimizer.param_groups[0]["lr"] = rate
    loop.run(50)
    (given,) = loop.guard.context.trials.given
    assert (given.outcome, given.begun_step, given.global_step) == ("not confirmed", 40, 94)
    assert trials.running is begins


@pytest.mark.parametrize(("survives", "begins"), [(True, False), (False, True)])
def test_a_rate_that_was_cut_or_rolled_back_is_not_survived(survives: bool, begins: bool) -> None:
    """After a rollback the run is not what the rates before have made of it."""
    plateau = Fault("stuck_loss", "learner", "loss", None, certain=False, doubtful=True)
    loop = BranchingLoop(lr=0.05)
    trials, state = loop.guard._parts.beside.trials, loop.guard.context.state

    def peak(step: int, batch: Tensor) -> None:
        loop.optimizer.param_groups[0]["lr"] = 0.2 if step in (20, 130) else 0.04

    loop.run(30, peak)
    if not survives:
        with torch.no_grad():
            loop.net.weight.fill_(float("nan"))
    loop.run(110, peak)
    assert state.rolled_back_since(20) is not survives
    assert not trials.running
    certified = loop.guard.context.ring.certified
    assert trials.begin(plateau, certified[-1], certified[0]) is begins


def test_memory_bounds_the_arms(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for one arm there is one, and with room for none there is no trial."""
    loop = BranchingLoop(lr=0.05)
    loop.run(30)
    learner = loop.guard.context.learner
    size = tensor_bytes(dict(learner.leaves()))
    for states, arms in ((7, 0), (8, 1), (100, 4)):
        monkeypatch.setattr(learner.device, "host_memory", lambda states=states: 4 * states * size)
        trial, began = with_trial(loop)
        assert began == bool(arms)
        assert trial._running is None if not arms else len(trial._running.arms) == arms


def test_a_batch_that_cannot_be_run_again_ends_a_trial() -> None:
    """The run goes on as it was, and nothing is said against it."""
    loop = BranchingLoop(lr=2.0)
    loop.run(50)
    loop.runs_again = False
    loop.run(2)
    assert not loop.guard._parts.beside.trials.running
    assert loop.records == []


def test_a_trial_that_runs_is_the_only_one() -> None:
    """To begin another one leaves the one that runs alone."""
    loop = BranchingLoop(lr=0.05)
    loop.run(30)
    trial, began = with_trial(loop)
    running = trial._running
    certified = loop.guard.context.ring.certified
    assert began
    assert trial.begin(SUSPICION, certified[-1], certified[0])
    assert trial._running is running


class Refuses(BranchingLoop):
    """Its batches cannot be run again."""

    def trainable(self) -> bool:
        return False

    def loss_on(self, index: int) -> float | None:
        return None


def test_where_nothing_can_be_tried_advice_is_given() -> None:
    """A loss that looks bad is told to the user, with the cause that the growth of the weights shows."""
    loop = Refuses(lr=2.0)
    loop.run(90)
    assert loop.records == []
    assert [one.cause for one in loop.advice][:1] == ["learning_rate_too_high"]


def test_a_trial_that_the_control_ends_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """If code changes weights outside of the steps, no further trial is made, and advice names suspicion and reason."""

    def unlike(control: Control, step: int) -> bool:
        control.failed = step > 50
        return not control.failed

    monkeypatch.setattr(Control, "follow", unlike)
    loop = BranchingLoop(lr=2.0)
    loop.run(60)
    assert remedies(loop) == []
    reason = "no trial can be made, because a copy of the model does not make the updates of the run"
    assert any(reason in one.suggestion for one in loop.advice)


def ordered(step: int, batch: Tensor) -> None:
    """Batches whose size changes with the data's order."""
    batch.mul_(1.0 + 0.5 * ((step // 16) % 2))


def test_data_in_an_order_do_not_count_against_the_run() -> None:
    """All states are compared on the same batches, whatever comes next."""
    loop = BranchingLoop(lr=0.05)
    loop.run(200, ordered)
    assert loop.records == []


@pytest.mark.parametrize(("until", "acts"), [(40, True), (80, False)])
def test_a_run_that_leads_on_batches_of_another_kind_goes_on(until: int, acts: bool) -> None:
    """In ordered data the newest batches may all be of one kind. A run is slowed only if the arm leads on batches from
    before the trial and spread over it, too."""

    class Ordered(BranchingLoop):
        def earlier(self) -> Sequence[Callable[[], float | None]]:
            return [self.other_kind if 40 < self.step <= until else self.probe]

        def other_kind(self) -> float:
            """Falls with the size of the weights, which are larger in a run that diverges."""
            return -float(self.net.weight.detach().norm())

    loop = Ordered(lr=2.0)
    loop.run(80)
    assert bool(loop.records) == acts


def test_arms_that_go_on_are_not_begun_anew() -> None:
    """A second trial keeps what the first one has trained, also where its arms have nothing left to learn."""
    loop = BranchingLoop(lr=0.05)
    loop.run(120)
    context = loop.guard.context
    trial = trial_runner(loop)
    with branches(loop).beside():
        learned = branches(loop).of()
    assert learned is not None
    learned.state.healthy = 64
    certified = context.ring.certified
    assert trial.begin(SUSPICION, certified[-1], certified[0], arm=learned.state, factor=0.5)
    running = trial._running
    assert running is not None
    for arm in running.arms:
        arm.losses = [0.1] * 16
    running.updates, running.start = 16, [0.05] * 5
    assert trial._pick(running)
    assert {arm.factor for arm in running.arms} <= {0.5 * near for near in context.thresholds.trial.near}
    assert running.updates == 16


@pytest.mark.parametrize(
    ("best", "kept"), [(1 / 256, {1 / 256, 1 / 64}), (1 / 16, {1 / 16, 1 / 64}), (1 / 4, {1 / 4, 1 / 16})]
)
def test_the_arms_next_to_the_best_go_on(best: float, kept: set[float]) -> None:
    """Beside the best arm the one at the next lower rate goes on, or at the next higher one if none is lower."""
    loop = BranchingLoop(lr=0.05)
    loop.run(30)
    trial, begun = with_trial(loop)
    running = trial._running
    assert begun
    assert running is not None
    for arm in running.arms:
        arm.losses = [1.0] * 8 + [0.5 if arm.factor == best else 0.6] * 8
    running.start = [0.9] * 5
    assert trial._pick(running)
    assert {arm.factor for arm in running.arms} == kept


@pytest.mark.parametrize(("start", "lower"), [(0.7, False), (0.4, True)])
def test_lower_rates_are_tried_too_if_all_arms_raise_the_loss(start: float, lower: bool) -> None:
    """The arms are compared with the start on the same batches. That the first batch was easy does not count. The best
    arms go on, because the newest batches may be of another kind."""
    loop = BranchingLoop(lr=0.05)
    loop.run(30)
    trial, _ = with_trial(loop)
    running = trial._running
    assert running is not None
    before = {arm.factor for arm in running.arms}
    for arm in running.arms:
        arm.losses = [0.5, *[0.6] * 15]
    running.updates, running.start = 16, [start] * 5
    assert trial._pick(running)
    after = {arm.factor for arm in running.arms}
    assert len(before & after) == 2
    assert any(factor < min(before) for factor in after) is lower
    assert running.updates == (0 if lower else 16)


def test_a_trial_that_the_end_of_the_run_would_cut_off_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial needs 64 updates. If the run makes fewer, none begins."""
    loop = BranchingLoop(lr=2.0)
    monkeypatch.setattr(loop, "updates_left", lambda: 120 - loop.step)
    loop.run(50)
    assert loop.guard._parts.beside.trials.running
    short = BranchingLoop(lr=2.0)
    monkeypatch.setattr(short, "updates_left", lambda: 100 - short.step)
    short.run(50)
    assert not short.guard._parts.beside.trials.running


def test_a_rate_that_falls_again_and_again_does_not_keep_a_trial_from_its_end() -> None:
    """Under a cyclic schedule a trial is begun again once. Then it goes on to its end."""
    loop = BranchingLoop(lr=0.05)

    def cycle(step: int, batch: Tensor) -> None:
        loop.optimizer.param_groups[0]["lr"] = 0.05 if step % 10 < 5 else 0.005

    loop.run(130, cycle)
    assert loop.records == []
    assert [one.outcome for one in loop.guard.context.trials.given][:2] == ["no result", "not confirmed"]


def test_without_room_for_lower_rates_the_trial_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best arms go on to the end of the trial, and no further ones are tried."""
    loop = BranchingLoop(lr=0.05)
    loop.run(30)
    trial, _ = with_trial(loop)
    running = trial._running
    assert running is not None
    for arm in running.arms:
        arm.losses = [0.6] * 16
    running.updates, running.start = 16, [0.4] * 5
    monkeypatch.setattr(trial._branches, "room", lambda: 4)
    assert trial._pick(running)
    assert (len(running.arms), running.updates) == (2, 16)

"""The policy: from a fault and its evidence to a plan."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_nanguard import Budget, ClipGradients, Fault, ReduceLR, Remedy, ResetMoments, Rollback, StopTraining
from lightning_nanguard.act.base import RunControl
from lightning_nanguard.act.defaults import default_remedies
from lightning_nanguard.decide.policy import Policy, depth_by_level
from lightning_nanguard.decide.recovery import prove
from lightning_nanguard.decide.state import PolicyState
from lightning_nanguard.thresholds.decision import RecoveryThresholds
from lightning_nanguard.types import (
    Clip,
    Comparison,
    DropMoments,
    Evidence,
    Plan,
    PlanStep,
    Restore,
    RestoreAverages,
    RestoreScale,
    Scale,
    Skip,
    Stop,
    Trial,
)

BATCH = Fault("non_finite_loss", "batch", "loss", math.nan, "the loss is nan", clipping_helps=True)
GRADIENT = Fault("non_finite_gradient", "batch", "gradient", math.nan, "a gradient is not finite", clipping_helps=True)
# A suspicion that needs no proof, as of a user's own detector.
EXPLODING = Fault("exploding_loss", "learner", "loss", 1e6, "the loss is 1e6", certain=False, proof="none",
                  clipping_helps=True)  # fmt: skip
STUCK = Fault("stuck_loss", "learner", "loss", 2.3, "the loss is 2.3", certain=False)
CORRUPTED = Fault("corrupted_state", "state", "buffer bn.running_var", None, "it is not finite")

GOOD = Evidence(step=500, healthy_steps=480, levels=(0.5, 0.6, 0.7), first=2.3, loss_unit=2.3,
                usual_norm=1.0, lr=0.1)  # fmt: skip
# Clipping that begins with a cut may do without it.
CUT = Scale(0.5, clipped=True)
BEHIND = Trial(0.4, "start", 1 / 4)
RUINED = Trial(1.1, "start", 1 / 64)
THE_BATCH = Comparison(math.nan, math.nan)
THE_LEARNER = Comparison(math.nan, 0.5)


def decide(fault: Fault, remedies: tuple[Remedy, ...] | None = None, **evidence: object) -> Plan:
    policy = Policy(default_remedies() if remedies is None else remedies)
    state = PolicyState(learner_step=450 if evidence.pop("again", False) else -1)
    return policy.decide(fault, dataclasses.replace(GOOD, **evidence), state)[0]


ROWS: list[tuple[str, Fault, dict[str, object], Plan]] = [
    ("a bad batch is skipped", BATCH, {"comparison": THE_BATCH}, (Skip(),)),
    ("a batch that holds NaN is skipped", BATCH, {"batch_finite": False, "bad_in_a_row": 4}, (Skip(),)),
    ("a stretch of bad batches is the data's", BATCH, {"comparison": THE_BATCH, "bad_in_a_row": 8}, (Skip(),)),
    ("bad in a row without a comparison: the learner", GRADIENT, {"bad_in_a_row": 4},
     (Restore(0), Clip(2.0), CUT)),
    ("lost out of nothing: the state", BATCH, {"comparison": THE_LEARNER}, (Restore(0),)),
    ("lost in a climb: the learner", BATCH, {"comparison": THE_LEARNER, "climbing": True},
     (Restore(0), Clip(2.0), CUT)),
    ("a corrupt weight: the state", BATCH, {"corrupt": "parameter w"}, (Restore(0),)),
    ("a corrupt weight after a rise of the rate", EXPLODING, {"corrupt": "parameter w", "rate_rose": True},
     (Restore(0), Scale(0.5, limit=True))),
    ("corrupted state", CORRUPTED, {}, (Restore(0),)),
    ("the loss scale alone is bad", CORRUPTED, {"alone": "scale"}, (RestoreScale(),)),
    ("averages alone are bad", CORRUPTED, {"corrupt": "w of an average", "alone": "averages"}, (RestoreAverages(),)),
    ("averages alone are bad at a peak of the rate", CORRUPTED,
     {"corrupt": "w of an average", "alone": "averages", "rate_rose": True}, (RestoreAverages(),)),
    ("a bad batch beside a bad average", BATCH,
     {"corrupt": "w of an average", "alone": "averages", "comparison": THE_BATCH}, (RestoreAverages(), Skip())),
    ("a divergence beside a bad average", EXPLODING, {"corrupt": "w of an average", "alone": "averages"},
     (Restore(0), Clip(2.0), CUT)),
    ("a divergence", EXPLODING, {}, (Restore(0), Clip(2.0), CUT)),
    ("a bad update that was made, and is back at once", BATCH,
     {"undo": True, "comparison": THE_LEARNER, "healthy_since_restore": 2}, (Restore(0), Clip(2.0), CUT)),
    ("an early one that was made, from a loss that good weights do not have", GRADIENT,
     {"undo": True, "healthy_steps": 3, "comparison": Comparison(1e9, 2.3)}, (Restore(0), Clip(2.0), CUT)),
    ("an early one that was made, from a loss that says nothing", BATCH,
     {"undo": True, "healthy_steps": 3, "comparison": THE_LEARNER}, (Restore(0),)),
    ("the same, where no batch can be run again", BATCH,
     {"undo": True, "comparable": False, "healthy_since_restore": 2}, (Restore(0), Clip(2.0), CUT)),
    ("a batch that reaches far beyond those before", BATCH, {"batch_strange": True, "bad_in_a_row": 8}, (Skip(),)),
    ("bad in a row under good weights too: the loss itself", GRADIENT,
     {"bad_in_a_row": 8, "comparison": Comparison(0.2, 0.2, then_finite=False)}, (Skip(),)),
    ("no deeper than half of what was learned", EXPLODING,
     {"levels": (0.3, 0.2, 2.3), "first": 2.3, "healthy_since_restore": 5}, (Restore(0), Clip(2.0), CUT)),
    ("a suspicion that nothing confirms, whatever has grown", STUCK, {"growth": 50.0}, ()),
    ("one that a trial does not confirm", STUCK, {"trial": Trial(), "growth": 50.0}, ()),
    ("a run that lacks a share", STUCK, {"trial": BEHIND}, ()),
    ("a run that lacks nearly all", STUCK, {"trial": RUINED, "levels": (2.3, 2.3, 2.3)},
     (Restore(2), Scale(1 / 64, tried=True))),
    ("the same where the rate has just risen", STUCK, {"trial": RUINED, "rate_rose": True},
     (Restore(2), Scale(1 / 64, limit=True, tried=True))),
    ("a state gone bad that was found by looking at a loss: the newest snapshot", STUCK,
     {"corrupt": "optimizer state exp_avg_sq of w", "levels": (1.0, 1.1, 2.3), "trial": RUINED}, (Restore(0),)),
    ("never good: stop", BATCH, {"healthy_steps": 0, "bad_in_a_row": 64}, (Stop("…"),)),
    ("never good, but for another optimizer's updates: wait", BATCH,
     {"healthy_steps": 0, "bad_in_a_row": 64, "good_beside": 500, "comparison": THE_BATCH}, (Skip(),)),
    ("bad for a whole window, but for another optimizer's updates: wait", BATCH,
     {"batch_finite": False, "bad_in_a_row": 1001, "good_beside": 500}, (Skip(),)),
    ("not good for a while: wait", BATCH, {"healthy_steps": 0, "bad_in_a_row": 63, "comparison": THE_BATCH}, (Skip(),)),
    ("bad for a whole window: stop", BATCH, {"batch_finite": False, "bad_in_a_row": 1001}, (Stop("…"),)),
    ("bad for almost as long: wait", BATCH, {"batch_finite": False, "bad_in_a_row": 1000}, (Skip(),)),
    ("not good yet: wait", BATCH, {"healthy_steps": 0, "bad_in_a_row": 3, "levels": ()}, (Skip(),)),
    ("a bad update that reached the weights", BATCH, {"undo": True}, (Restore(0),)),
    ("deeper where an older snapshot was better", EXPLODING, {"levels": (5.0, 4.0, 0.5)},
     (Restore(2), Clip(2.0), CUT)),
    ("back soon: clipping alone is not enough any more", EXPLODING, {"healthy_since_restore": 5, "again": True},
     (Restore(0), Clip(2.0), Scale(0.25))),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "evidence", "plan"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_the_evidence_chooses(fault: Fault, evidence: dict[str, object], plan: Plan) -> None:
    """Each kind of evidence leads to the remedy that fits it."""
    found = decide(fault, **evidence)
    shown = tuple(Stop("…") if isinstance(step, Stop) else step for step in found)
    assert shown == plan


REMEDIES: list[tuple[str, tuple[Remedy, ...], Fault, dict[str, object], Plan]] = [
    ("skip only", (), BATCH, {}, (Skip(),)),
    ("skip only, weights that give no finite loss", (), BATCH,
     {"bad_in_a_row": 4, "comparison": THE_LEARNER, "healthy_since_restore": 2}, (Skip(),)),
    ("skip only, learner lost", (), EXPLODING, {"corrupt": "parameter w"}, (Stop("…"),)),
    ("stop", (StopTraining(),), EXPLODING, {}, (Stop("…"),)),
    ("stop after what helps", (Rollback(), ReduceLR(), StopTraining()), EXPLODING, {}, (Restore(0), Scale(0.5))),
    ("a cut without a rollback", (ReduceLR(factor=0.3),), EXPLODING, {}, (Scale(0.3),)),
    ("every correction, in the order listed", (Rollback(), ReduceLR(), ClipGradients(5.0)), GRADIENT,
     {"bad_in_a_row": 4}, (Restore(0), Scale(0.5), Clip(5.0))),
    ("an update that was made is taken back even so", (ReduceLR(),), BATCH,
     {"undo": True, "comparison": THE_LEARNER, "healthy_since_restore": 2}, (Restore(0), Scale(0.5))),
    ("the same with skips only", (), BATCH,
     {"undo": True, "comparison": THE_LEARNER, "healthy_since_restore": 2}, (Restore(0),)),
    ("a rate at its floor", (Rollback(), ReduceLR(min_lr=0.1)), EXPLODING, {}, (Restore(0),)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("remedies", "fault", "evidence", "plan"), [row[1:] for row in REMEDIES], ids=[row[0] for row in REMEDIES]
)
def test_the_remedies_allowed(
    remedies: tuple[Remedy, ...], fault: Fault, evidence: dict[str, object], plan: Plan
) -> None:
    """Only what is listed is done, in the order listed."""
    found = decide(fault, remedies, **evidence)
    assert tuple(Stop("…") if isinstance(step, Stop) else step for step in found) == plan


def test_trouble_that_comes_back_soon_is_treated_harder() -> None:
    """Each time deeper and with a larger cut; after a calm stretch the escalation starts over."""
    policy = Policy((Rollback(), ReduceLR(), ResetMoments()))
    state, plans = PolicyState(), []
    for since in (None, 10, 10, 10, 1000):
        plan, state = policy.decide(EXPLODING, dataclasses.replace(GOOD, healthy_since_restore=since), state)
        plans.append(plan)
    assert plans[0] == (Restore(0), Scale(0.5))
    assert plans[1] == (Restore(0), Scale(0.25), DropMoments())
    assert plans[2] == (Restore(1), Scale(0.1), DropMoments())
    assert plans[3] == (Restore(2), Scale(0.1), DropMoments())
    assert plans[4] == (Restore(0), Scale(0.5))


@pytest.mark.parametrize(
    ("lowest", "rose", "limit"), [(0.2, False, True), (0.9, False, False), (0.9, True, True), (None, False, False)]
)
def test_a_rate_that_has_risen_is_limited(lowest: float | None, rose: bool, limit: bool) -> None:
    """A multiplier would be outgrown by a schedule that goes on rising, however little it has since the snapshot."""
    evidence = dataclasses.replace(GOOD, lr=1.0, lowest_lr=lowest, rate_rose=rose)
    plan, _ = Policy(default_remedies()).decide(EXPLODING, evidence, PolicyState())
    [cut] = [step for step in plan if isinstance(step, Scale)]
    assert cut.limit is limit


def test_a_rate_that_fails_takes_the_proof_of_lower_ones_along() -> None:
    """Where the learner diverged at about a proven rate nothing is proven any more, and the next proof may come at any
    loss."""
    policy = Policy(default_remedies())
    state = PolicyState(proven_rate=0.1, proven_level=0.5)
    _, kept = policy.decide(EXPLODING, dataclasses.replace(GOOD, lr=1.0), state)
    _, lost = policy.decide(EXPLODING, dataclasses.replace(GOOD, lr=0.2), state)
    assert (kept.proven_rate, kept.proven_level) == (0.1, 0.5)
    assert prove(0.05, 0.9, 0.5, lost, RecoveryThresholds()).proven_rate == 0.05


def test_a_share_that_is_lacking_has_to_show_twice_in_a_row() -> None:
    """A trial that speaks for the run in between starts the count anew; what lacks nearly all needs one trial."""
    policy, state, acted = Policy(default_remedies()), PolicyState(), []
    for trial in (BEHIND, Trial(), BEHIND, BEHIND, RUINED):
        plan, state = policy.decide(STUCK, dataclasses.replace(GOOD, trial=trial), state)
        acted.append(bool(plan))
    assert acted == [False, False, False, True, True]


def test_the_factor_of_a_trial_holds() -> None:
    """A rate that was good long ago is not kept against a trial that found a lower one much better."""
    state, evidence = PolicyState(proven_rate=0.1), dataclasses.replace(GOOD, highest_lr=1.0)
    assert Policy(default_remedies()).decide(EXPLODING, evidence, state)[0] == (Restore(0), Clip(2.0))
    plan, _ = Policy(default_remedies()).decide(STUCK, dataclasses.replace(evidence, trial=RUINED), state)
    assert [step.factor for step in plan if isinstance(step, Scale)] == [RUINED.factor]


faults = st.sampled_from([BATCH, GRADIENT, EXPLODING, STUCK, CORRUPTED])
comparisons = st.sampled_from([None, THE_BATCH, THE_LEARNER, Comparison(9.0, 1.0), Comparison(1.0, 1.0)])


@given(
    st.lists(st.tuples(faults, comparisons, st.booleans(), st.integers(0, 30)), min_size=200, max_size=200),
    st.sampled_from([default_remedies(), (), (StopTraining(),), (Rollback(),)]),
)
@settings(max_examples=40)
def test_every_loop_of_interventions_ends(
    story: list[tuple[Fault, Comparison | None, bool, int]], remedies: tuple[Remedy, ...]
) -> None:
    """Whatever comes, within the window there are never more rollbacks than the budget allows."""
    budget = Budget(max_rollbacks=6, max_bad_batches=10, window=10_000)
    policy, state, step, restores = Policy(remedies, budget), PolicyState(), 0, 0
    for fault, comparison, corrupt, healthy in story:
        step += 1 + healthy
        evidence = dataclasses.replace(
            GOOD, step=step, comparison=comparison, trial=RUINED, corrupt="parameter w" if corrupt else None,
            healthy_since_restore=healthy, growth=20.0,
        )  # fmt: skip
        plan, state = policy.decide(fault, evidence, state)
        restores += any(isinstance(one, Restore) for one in plan)
        if any(isinstance(one, Stop) for one in plan):
            break
    assert restores <= 6


def test_rare_faults_do_not_use_up_a_budget() -> None:
    """A long run with a rollback now and then goes on for ever."""
    policy, state = Policy(default_remedies(), Budget(max_rollbacks=3, window=100)), PolicyState()
    for step in range(0, 50_000, 50):
        evidence = dataclasses.replace(GOOD, step=step, healthy_since_restore=50)
        plan, state = policy.decide(CORRUPTED, evidence, state)
        assert not any(isinstance(one, Stop) for one in plan)
        state = dataclasses.replace(state, unproven=())  # a snapshot is certified


def test_a_rollback_that_changes_nothing_is_not_made_a_third_time() -> None:
    """The same fault at the same place, twice rolled back without a correction and without a snapshot certified since,
    is taken for the learner's: it is corrected, or ends the run where no correction is listed. Another fault, a
    corrected rollback and a certified snapshot do not count."""
    elsewhere = dataclasses.replace(CORRUPTED, place="parameter w")
    story = (CORRUPTED, elsewhere, EXPLODING, EXPLODING, EXPLODING, CORRUPTED, elsewhere, CORRUPTED)
    last = []
    for remedies in (default_remedies(), (Rollback(),)):
        policy, state, plans = Policy(remedies), PolicyState(), []
        for fault in story:
            plan, state = policy.decide(fault, dataclasses.replace(GOOD, healthy_since_restore=5), state)
            plans.append(plan)
            if remedies == (Rollback(),) and fault is EXPLODING:
                state = dataclasses.replace(state, unproven=tuple(one for one in state.unproven if "loss" not in one))
        assert not any(isinstance(one, Stop) for plan in plans[:2] + plans[5:-1] for one in plan)
        last.append(plans[-1])
    assert any(isinstance(step, Scale) for step in last[0])
    assert last[1] == (Stop("the fault came back after each of 2 rollbacks, before another snapshot was certified"),)


def test_skips_alone_end_nothing() -> None:
    """Nine of ten updates bad are skipped for ever, but for the bounds that a user gives; the stop names the bound."""
    ends = []
    for budget in (Budget(), Budget(max_skip_share=0.5), Budget(max_bad_batches=8)):
        policy, state, ended = Policy(default_remedies(), budget), PolicyState(), None
        for step in range(3000):
            bad = step % 10
            evidence = dataclasses.replace(GOOD, step=step, batch_finite=False, bad_in_a_row=bad)
            plan, state = policy.decide(BATCH, evidence, state) if bad else ((), state)
            ended = next(((step, one.limit) for one in plan if isinstance(one, Stop)), None)
            if ended is not None:
                break
        ends.append(ended)
    assert ends == [None, (36, "max_skip_share"), (9, "max_bad_batches")]


@pytest.mark.parametrize("limit", ["max_rollbacks", "max_rollbacks_per_place"])
def test_a_stop_names_the_limit_of_rollbacks(limit: str) -> None:
    """It is the argument of the budget that allows no further rollback."""
    policy, state = Policy(default_remedies(), Budget(**{limit: 2})), PolicyState()
    for _ in range(3):
        plan, state = policy.decide(dataclasses.replace(EXPLODING, certain=True), GOOD, state)
    assert [one.limit for one in plan if isinstance(one, Stop)] == [limit]


@pytest.mark.parametrize(("most", "limit"), [(None, ""), (100, ""), (32, "max_bad_batches")])
def test_a_stop_names_only_a_limit_that_can_be_raised(most: int | None, limit: str) -> None:
    """A run without one good update ends after 64 bad ones, whatever the budget allows."""
    evidence = dataclasses.replace(GOOD, healthy_steps=0, bad_in_a_row=64)
    plan, _ = Policy(default_remedies(), Budget(max_bad_batches=most)).decide(BATCH, evidence, PolicyState())
    assert [one.limit for one in plan if isinstance(one, Stop)] == [limit]


@dataclasses.dataclass(frozen=True)
class Page(PlanStep):
    """Tell somebody."""


class PageSomebody(Remedy):
    word, step = "page", Page

    def propose(self, fault: Fault, evidence: Evidence, attempt: int) -> PlanStep | None:
        return Page()

    def apply(self, step: PlanStep, run: RunControl) -> None:
        pass


class Halve(Remedy):
    """A remedy of a user's own that changes the rate in its own way."""

    word, step, role = "halve", Page, "rate"  # type: ignore[assignment]

    def propose(self, fault: Fault, evidence: Evidence, attempt: int) -> PlanStep | None:
        return Page()

    def apply(self, step: PlanStep, run: RunControl) -> None:
        pass


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize(
    ("fault", "evidence"),
    [(BATCH, {}), (EXPLODING, {}), (CORRUPTED, {}), (EXPLODING, {"corrupt": "parameter w", "levels": ()})],
    ids=["skipped", "learner", "state", "stopped"],
)
def test_who_notifies_is_asked_at_every_fault(place: int, fault: Fault, evidence: dict[str, object]) -> None:
    """Wherever it is listed, it is asked at every fault, takes no other's place and makes no other unheard."""
    remedies = [*default_remedies()]
    without = decide(fault, tuple(remedies), **evidence)
    remedies.insert(place, PageSomebody())
    assert decide(fault, tuple(remedies), **evidence) == (*without, Page())


def test_nobody_is_told_of_a_suspicion_that_was_none() -> None:
    """Where a suspicion is dismissed there is no plan, and nobody is notified."""
    assert decide(STUCK, (*default_remedies(), PageSomebody()), trial=Trial()) == ()


def test_a_remedy_of_ones_own_takes_the_role_it_names() -> None:
    """A remedy whose role is the rate is asked like ReduceLR, beside it, and not for a bad batch."""
    both = (Rollback(), Halve(), ReduceLR())
    assert decide(EXPLODING, both) == (Restore(0), Page(), Scale(0.5))
    assert decide(BATCH, both) == (Skip(),)
    assert decide(CORRUPTED, both) == (Restore(0),)


def test_stopping_makes_no_later_remedy_unheard() -> None:
    """StopTraining listed after what helps is passed over, and what is listed behind it is still asked."""
    remedies = (Rollback(), StopTraining(), ReduceLR())
    assert decide(EXPLODING, remedies) == (Restore(0), Scale(0.5))


def test_averages_are_restored_as_often_as_they_go_bad() -> None:
    """Averages cost the budget nothing and never end a run. Where no remedy may restore, they are left alone."""
    averages = dataclasses.replace(GOOD, corrupt="w of an average", alone="averages")
    policy, state = Policy(default_remedies(), Budget(max_rollbacks=1)), PolicyState()
    for _ in range(50):
        plan, state = policy.decide(CORRUPTED, averages, state)
        assert plan == (RestoreAverages(),)
    assert state == PolicyState()
    assert Policy(()).decide(CORRUPTED, averages, PolicyState())[0] == ()


@pytest.mark.parametrize(
    ("levels", "depth", "keeps", "expected"),
    [
        ((0.5, 0.5, 0.5), 0, True, 0),
        ((2.0, 0.5, 0.5), 0, True, 1),
        ((2.0, 0.5, 0.5), 2, True, 2),
        ((0.5, 0.5, 2.2), 2, True, 1),
        ((0.5, 0.5, 2.2), 2, False, 2),
        ((None, None), 1, True, 1),
        ((0.5,), 7, True, 0),
    ],
    ids=["equal", "a newer one is worse", "asked for", "half is kept", "not kept", "no level known", "no deeper one"],
)
def test_depth_by_level(levels: tuple[float | None, ...], depth: int, keeps: bool, expected: int) -> None:
    """At least the depth asked for, deeper while the level is clearly worse, and short of losing half of what was
    learned."""
    evidence = Evidence(step=1, first=2.3, loss_unit=2.3, levels=levels)
    assert depth_by_level(depth, evidence, same_level=0.1, keeps=keeps) == expected

"""Finite tensors that are far out of range."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lightning_nanguard.state.norm_screen import NormScreen
from lightning_nanguard.state.plausibility import PlausibilityCheck, first_jump
from lightning_nanguard.state.ring import Ring
from lightning_nanguard.state.snapshot import Share, Snapshot, capture
from lightning_nanguard.thresholds.snapshots import PlausibilityThresholds
from tests.state.nets import made, train

SETTLED = PlausibilityThresholds().settled_after + 1


class Trained:
    """A network after one update, its snapshot certified, and a check whose trial answers as told."""

    def __init__(self, *, worse: bool = False, thresholds: PlausibilityThresholds | None = None) -> None:
        self.net, self.optimizer, self.learner = made("adam")
        train(self.net, self.optimizer, 1, seed=1)
        self.ring = Ring()
        self.ring.certified = [capture(self.learner, step=1, global_step=1)]
        self.trials: list[tuple[Snapshot, Snapshot]] = []
        self.worse = worse
        self.check = PlausibilityCheck(self.learner, self.ring, self._is_worse, thresholds or PlausibilityThresholds())

    def _is_worse(self, state: Snapshot, than: Snapshot) -> bool:
        self.trials.append((state, than))
        return self.worse

    def fault(self, healthy_steps: int = SETTLED, *, on_batches: bool = False) -> str | None:
        state = capture(self.learner, step=9, global_step=9)
        found = self.check.implausible(state.leaves, healthy_steps, state if on_batches else None)
        if found is None:
            return None
        assert (found.kind, found.scope, found.rate_may_cause) == ("implausible_state", "state", True)
        return found.place


def test_the_first_jump_is_named() -> None:
    """Growth of the largest element counts, from a magnitude up, of the tensors asked for."""
    then = {("parameter", name): torch.tensor([value, 0.0]) for name, value in (("a", 1e-3), ("b", 2.0), ("c", 1.0))}
    now = {("parameter", name): torch.tensor([value, 1.0]) for name, value in (("a", 9.0), ("b", -30.0), ("c", 1e9))}
    assert first_jump(now, then, [("parameter", "a"), ("parameter", "b")], 10.0, 1.0) == "parameter b"
    assert first_jump(now, then, list(now), 10.0, 1e-3) == "parameter a"
    assert first_jump(now, then, [], 10.0, 1.0) is None
    assert first_jump({("parameter", "a"): 3}, {("parameter", "a"): 1}, list(now), 10.0, 1.0) is None


def test_a_moment_that_was_zero_has_no_size_to_grow_from() -> None:
    """Adagrad's sums start at 0, and in other units of the loss they go further."""
    moment, weight = ("optimizer", 0, "w", "sum"), ("parameter", "w")
    then = {key: torch.zeros(2) for key in (moment, weight)}
    now = {key: torch.full((2,), 1e15) for key in (moment, weight)}
    assert first_jump(now, then, [moment], 1e12, 1.0) is None
    assert first_jump(now, then, [weight], 1e12, 1.0) == "parameter w"
    assert first_jump(now, {moment: torch.ones(2)}, [moment], 1e12, 1.0) is not None


def test_nothing_is_implausible_without_a_certified_snapshot() -> None:
    """There is nothing to compare with then."""
    run = Trained()
    run.ring.certified = []
    run.net.last.weight.data[0, 0] = 1e9
    assert run.fault() is None


@pytest.mark.parametrize(
    ("place", "value", "found"),
    [
        ("weight", 999.0, False), ("weight", 1001.0, True), ("moment", 9_999.0, False), ("moment", 10_001.0, True),
        ("statistic", 9_999.0, False), ("statistic", 10_001.0, True), ("count", 1e9, False),
    ],
)  # fmt: skip
def test_what_grew_too_far_is_found(place: str, value: float, found: bool) -> None:
    """Weights may grow a thousand times, moments and statistics ten thousand times, other buffers at will."""
    run = Trained()
    assert run.fault() is None
    names = {
        "weight": (run.net.last.weight, "parameter last.weight"),
        "moment": (run.optimizer.state[run.net.last.bias]["exp_avg_sq"], "optimizer state exp_avg_sq of last.bias"),
        "statistic": (run.net.norm.running_mean, "buffer norm.running_mean"),
        "count": (run.net.count, ""),
    }
    tensor, name = names[place]
    tensor.data.view(-1)[0] = value
    assert run.fault() == (name if found else None)
    assert run.check.watches_statistics is (found and place == "statistic")


def test_snapshots_that_ranks_share_are_compared_by_their_sizes() -> None:
    """A rank that stores only a part of each tensor still finds a weight that is far too large."""
    run = Trained()
    (snapshot,) = run.ring.certified
    for key, leaf in snapshot.leaves.items():
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            snapshot.typical[key] = float(leaf.square().mean().sqrt())
            snapshot.leaves[key] = Share(torch.zeros(1, dtype=torch.uint8), leaf.shape, leaf.dtype)
    assert run.fault() is None
    run.net.last.weight.data[0, 0] = 1e9
    assert run.fault() == "parameter last.weight"
    assert run.check.is_far("parameter last.weight")


def test_early_in_a_run_only_a_trial_proves_it() -> None:
    """While weights may have far to go, one is at fault only where the newest batches do worse, or beyond all measure;
    moments come from their initial values, and are at fault only beyond all measure."""
    run = Trained(worse=False)
    run.net.last.weight.data[0, 0] = 1e6
    run.optimizer.state[run.net.last.bias]["exp_avg_sq"][0] = 1e6
    assert run.fault(3, on_batches=True) is None
    assert run.fault(3) is None
    (tried,) = run.trials
    assert tried[1] is run.ring.certified[0]
    run.worse = True
    assert run.fault(3, on_batches=True) == "parameter last.weight"
    run = Trained()
    run.net.last.weight.data[0, 0] = 1e13
    assert run.fault(3) == "parameter last.weight"


def test_what_comes_back_is_how_it_is() -> None:
    """A tensor found again after a restore is left alone, but for a weight under which batches do worse, three times
    at most."""
    run = Trained(worse=True)
    run.net.last.weight.data[0, 0] = 1e6
    found = [run.fault(on_batches=True) for _ in range(5)]
    assert found == ["parameter last.weight"] * 3 + [None] * 2
    run = Trained(worse=True)
    run.net.norm.running_var[0] = 1e6
    assert [run.fault(on_batches=True) for _ in range(2)] == ["buffer norm.running_var", None]
    assert run.trials == []


def test_a_batch_that_spoils_statistics_is_at_fault() -> None:
    """Running statistics are compared with what they were before the batch."""
    run = Trained()
    before = {name: buffer.clone() for name, buffer in run.net.named_buffers()}
    run.check.watches_statistics = True
    assert run.check.strange_buffers(before, SETTLED) is None
    run.net.norm.running_var[0] = 1e6
    assert run.check.strange_buffers(before, 3) is None, "they still come from their initial values"
    fault = run.check.strange_buffers(before, SETTLED)
    assert fault is not None
    assert (fault.kind, fault.scope, fault.place) == ("implausible_statistics", "batch", "buffer norm.running_var")
    assert not fault.conclusive  # the weights may have made them so
    assert fault.message == "this batch made buffer norm.running_var over 10000 times as large"


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_statistics_that_were_bad_are_watched_from_then_on(value: float) -> None:
    """A batch that makes them so again is at fault; a weight that is not finite says nothing of the batches."""
    run = Trained()
    run.check.watch("parameter last.weight")
    assert not run.check.watches_statistics
    run.check.watch("the root of buffer norm.running_var")
    assert run.check.watches_statistics
    before = {name: buffer.clone() for name, buffer in run.net.named_buffers()}
    run.net.norm.running_var[0] = value
    fault = run.check.strange_buffers(before, SETTLED)
    assert fault is not None
    assert (fault.scope, fault.place) == ("batch", "buffer norm.running_var")
    before["norm.running_var"][0] = math.nan
    assert run.check.strange_buffers(before, SETTLED) is None, "it was bad before this batch"


def test_another_buffer_is_watched_once_it_was_bad() -> None:
    """A batch that writes NaN into it is at fault, in a resumed run, too; Inf may belong there."""
    run = Trained()
    run.check.watch("buffer count")
    assert run.check.watches
    assert not run.check.watches_statistics
    before = {name: buffer.clone() for name, buffer in run.net.named_buffers()}
    run.net.norm.running_var[0] = math.nan
    run.net.count.fill_(math.inf)
    assert run.check.strange_buffers(before, SETTLED) is None
    run.net.count.fill_(math.nan)
    resumed = PlausibilityCheck(run.learner, run.ring, lambda state, than: False)
    assert resumed.strange_buffers(before, SETTLED) is None
    resumed.load_state_dict(run.check.state_dict())
    fault = resumed.strange_buffers(before, SETTLED)
    assert fault is not None
    assert (fault.kind, fault.scope, fault.place) == ("non_finite_statistics", "batch", "buffer count")
    assert fault.message == "the forward pass of this batch made buffer count NaN"
    before["count"].fill_(math.nan)
    assert resumed.strange_buffers(before, SETTLED) is None, "it was bad before this batch"


def test_a_screen_tells_what_to_look_at() -> None:
    """Norms clear what cannot have grown too far; early on moments are looked at only beyond all measure."""
    check = Trained().check
    weight, moment = ("parameter", "w"), ("optimizer", 0, "w", "exp_avg")
    before = {weight: 1.0, moment: 1.0}
    screen = NormScreen([(weight, torch.tensor([1.0, 2e3])), (moment, torch.tensor([1.0, 2e3]))])
    assert check.screen(screen, before, SETTLED) == {weight, moment}
    assert check.screen(screen, before, 3) == {weight}
    assert check.screen(NormScreen([(weight, torch.ones(9))]), before, SETTLED) == set()


def test_thresholds_are_given() -> None:
    """How far is too far can be set."""
    run = Trained(thresholds=replace(PlausibilityThresholds(), weight_growth=5.0, settled_after=0))
    run.net.last.weight.data[0, 0] = 6.0
    assert run.fault(1) == "parameter last.weight"


@pytest.mark.parametrize(("name", "power"), [("exp_avg", 1), ("exp_avg_sq", 2)])
def test_moments_may_grow_with_the_gradients(name: str, power: int) -> None:
    """If a weight of the loss has grown, so have the gradients, and moments that follow them are in range."""
    trained = Trained()
    entry, weight = trained.optimizer.state[trained.net.last.weight], trained.net.last.weight
    assert weight.grad is not None
    weight.grad *= 1e6
    entry[name].copy_(weight.grad.abs() ** power)
    assert trained.fault() is None
    entry[name] *= 1000
    assert trained.fault() == f"optimizer state {name} of last.weight"


@pytest.mark.parametrize(("norm", "value", "found"), [(None, 1e30, False), (3.0, 1e30, True), (1e9, 1e29, False)])
def test_a_new_moment_is_measured_by_the_gradients(norm: float | None, value: float, found: bool) -> None:
    """A second moment that no snapshot has yet is out of range where no gradient seen can have made it."""
    run = Trained()
    key = ("optimizer", 0, "last.weight", "exp_avg_sq")
    newest = run.ring.certified[0]
    assert key in newest.leaves
    run.ring.certified = [replace(newest, leaves={one: leaf for one, leaf in newest.leaves.items() if one != key})]
    check = PlausibilityCheck(run.learner, run.ring, lambda state, than: False, largest_norm=lambda index: norm)
    run.optimizer.state[run.net.last.weight]["exp_avg_sq"][0, 0] = value
    leaves = dict(run.learner.leaves())
    tensors = [(key, leaf) for key, leaf in run.learner.leaves() if isinstance(leaf, torch.Tensor)]
    screened = check.screen(NormScreen(tensors), {}, 5)
    fault = check.implausible(leaves, 5)
    assert (fault is not None) == found
    assert (key in screened) or not found
    assert fault is None or fault.place == "optimizer state exp_avg_sq of last.weight"


def test_a_new_moment_of_another_optimizer_is_left_alone() -> None:
    """What a user's own optimizer keeps under such a name may have any size."""
    run = Trained()
    run.ring.certified = [replace(run.ring.certified[0], leaves={})]
    type(run.optimizer).__module__, torchs = "mine", type(run.optimizer).__module__
    try:
        check = PlausibilityCheck(run.learner, run.ring, lambda state, than: False, largest_norm=lambda index: 1.0)
        run.optimizer.state[run.net.last.weight]["exp_avg_sq"][0, 0] = 1e30
        assert check.implausible(dict(run.learner.leaves()), 5) is None
    finally:
        type(run.optimizer).__module__ = torchs

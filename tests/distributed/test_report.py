"""Reports of ranks on one update: packed, combined into one reading, and compared."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_nanguard import NonFinite
from lightning_nanguard.act.defaults import default_remedies
from lightning_nanguard.decide.policy import Policy
from lightning_nanguard.decide.state import PolicyState
from lightning_nanguard.distributed.report import Report, combined_reading, minority_ranks, outlier_ranks
from lightning_nanguard.thresholds import DistributedThresholds
from lightning_nanguard.types import Evidence

HEALTHY = Report(
    loss=1.0,
    norm=2.0,
    scale=0.0,
    step=7,
    has_loss=True,
    has_gradient=True,
    gradient_finite=True,
    has_scale=False,
    suspects=False,
    snapshot_interval=16,
    pending_step=5,
    rejects_pending=False,
    parameter_checksum=3,
    optimizer_checksum=4,
)


def report(**changed: Any) -> Report:
    return HEALTHY._replace(**changed)


@given(st.floats(), st.floats(), st.booleans(), st.integers(-(2**62), 2**62))
def test_a_report_travels_bit_by_bit(loss: float, norm: float, flag: bool, number: int) -> None:
    """What is packed comes back, NaN and infinities included, in whole words of eight bytes."""
    one = report(loss=loss, norm=norm, suspects=flag, parameter_checksum=number)
    assert repr(Report.unpack(one.pack())) == repr(one)
    assert len(one.pack()) == 72


def test_one_bad_rank_makes_a_bad_reading() -> None:
    """A loss or gradient that is not finite on one rank is so for all, and the rank is named."""
    by_loss = [report(), report(loss=math.nan)]
    reading = combined_reading(by_loss, optimizer_index=0, sharded=False)
    assert (reading.finite, reading.loss_finite, outlier_ranks(by_loss)) == (False, False, (1,))
    by_gradient = [report(norm=math.inf, gradient_finite=False), report()]
    reading = combined_reading(by_gradient, optimizer_index=0, sharded=True)
    assert (reading.finite, reading.loss_finite, outlier_ranks(by_gradient)) == (False, True, (0,))
    assert reading.grad_norm == math.inf
    assert outlier_ranks([report(), report()]) == ()
    assert outlier_ranks([report(loss=math.nan), report(loss=math.nan)]) == ()


@pytest.mark.parametrize(("sharded", "norm"), [(True, 5.0), (False, 4.0)])
def test_norms_of_shards_add_up(sharded: bool, norm: float) -> None:
    """The norm is that of all shards together, or of the gradient that all ranks hold; a loss that is missing on one
    rank does not count."""
    both = [report(norm=3.0, loss=2.0), report(norm=4.0, has_loss=False, loss=0.0)]
    reading = combined_reading(both, optimizer_index=1, sharded=sharded)
    assert (reading.grad_norm, reading.loss, reading.optimizer_index, reading.step) == (norm, 2.0, 1, 7)


def test_the_mean_of_large_losses_is_finite() -> None:
    """Losses whose sum overflows have a mean all the same."""
    both = [report(loss=1.5e308), report(loss=1.7e308)]
    assert combined_reading(both, optimizer_index=0, sharded=False).loss_finite
    loss = combined_reading([report(loss=1.5e308)] * 2, optimizer_index=0, sharded=False).loss
    assert math.isfinite(loss or math.nan)


def test_the_rank_with_the_far_larger_loss_stands_out() -> None:
    """A finite loss stands out from a given ratio to the next largest one on."""
    reports = [report(loss=1.0), report(loss=-11.0), report(loss=0.5)]
    assert outlier_ranks(reports) == (1,)
    assert outlier_ranks(reports, replace(DistributedThresholds(), outlier_loss_ratio=12.0)) == ()
    assert outlier_ranks([report(loss=1e9)]) == ()


def test_the_minority_is_named() -> None:
    """Of three ranks the odd one out; of two nobody can say."""
    assert minority_ranks([5, 9, 5]) == (1,)
    assert minority_ranks([5, 9]) == ()


@pytest.mark.parametrize("sharded", [False, True])
def test_the_decision_is_the_same_in_any_order_of_ranks(sharded: bool) -> None:
    """Which rank has which number decides nothing: the fault and the plan for it are those of any other order."""
    draw = random.Random(0)
    policy = Policy(default_remedies())
    for _ in range(300):
        reports = []
        for _ in range(3):
            loss, norm = (
                draw.choice([1.0, 2.5, math.nan, math.inf, 1e30]),
                draw.choice([0.0, 3.0, 1e25, math.inf, math.nan]),
            )
            finite = norm == norm and draw.random() < 0.7  # a sum of squares may overflow
            reports.append(report(loss=loss, norm=norm, gradient_finite=finite, has_loss=draw.random() < 0.9))
        told = set()
        for order in permutations(reports):
            reading = combined_reading(order, optimizer_index=0, sharded=sharded)
            fault = NonFinite().check(reading)
            evidence = Evidence(step=9, healthy_steps=8, levels=(1.0,), usual_norm=1.0, lr=0.1)
            plan = () if fault is None else policy.decide(fault, evidence, PolicyState())[0]
            told.add((reading.finite, reading.loss_finite, None if fault is None else (fault.kind, fault.place), plan))
        assert len(told) == 1

"""No finding contradicts the evidence in it, whatever the case."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_nanguard import (
    Case,
    Change,
    Clues,
    Comparison,
    Course,
    Curvature,
    EarlierFinding,
    Evidence,
    Fault,
    Finding,
    Intervention,
    Layer,
    Model,
    Objective,
    Origin,
)
from lightning_nanguard.decide.rate_limit import spare_rate, within_curvature
from lightning_nanguard.diagnosis.case import NO_FAULT
from lightning_nanguard.diagnosis.rule_set import RuleSet
from lightning_nanguard.record.messages import tell_again
from lightning_nanguard.thresholds.diagnosis import DEFAULT
from lightning_nanguard.types import Clip, Restore, Scale, Trial
from tests.diagnosis.rules import faults

FAULTS = [NO_FAULT, *(fault for fault in vars(faults).values() if isinstance(fault, Fault))]
OPERATIONS = (
    *("log", "log1p", "logit", "xlogy", "exp", "exp2", "sinh", "div", "rsqrt", "pow", "mean", "std", "softmax"),
    *("nll_loss_forward", "sqrt", "acos", "ctc_loss", "mm", "sum", "linalg_eigh", "to_copy"),
)

positive = st.floats(1e-12, 1e12) | st.floats(0.01, 100)
number = st.floats(-1e12, 1e12) | st.floats(-200, 200)
loss = number | st.sampled_from([faults.NAN, faults.INF])
rate = st.floats(1e-8, 1e4)
any_rate = rate | st.sampled_from([0.0, -0.1, faults.NAN, faults.INF])


@st.composite
def ends(draw: st.DrawFn) -> tuple[float, float]:
    low, high = sorted(draw(st.tuples(number, number)))
    return low, high


@st.composite
def origins(draw: st.DrawFn) -> Origin:
    low, high = draw(ends())
    known = draw(st.booleans())
    smallest = 0.0 if low <= 0 <= high and draw(st.booleans()) else min(abs(low), abs(high))
    return Origin(
        operation=draw(st.sampled_from(OPERATIONS)),
        line=draw(st.sampled_from(["", "model.py:12"])),
        backward=draw(st.booleans()),
        dtype=draw(st.sampled_from(["float32", "float16", "bfloat16", "float64"])),
        samples=draw(st.sampled_from([(), (3,), (1, 4)])),
        lowest=low if known else None,
        highest=high if known else None,
        smallest=smallest if known else None,
        exponent=draw(st.none() | st.sampled_from([-1.0, 0.5, 2.0])),
        from_weights=draw(st.booleans()),
        from_target=draw(st.booleans()),
        from_mask=draw(st.booleans()),
        put_in=draw(st.booleans()),
        given=draw(st.sampled_from(["", "weight"])),
        made_by=draw(st.sampled_from(["", "std", "sum", "sqrt"])),
        empty=draw(st.booleans()),
    )


clues = st.builds(
    Clues,
    inputs=st.none() | st.sampled_from([faults.NORMAL, faults.PIXELS]),
    target=st.none() | st.sampled_from([faults.NORMAL, faults.FAR]),
    replayed=st.booleans(),
    loss=st.none() | loss,
    gradient_finite=st.none() | st.booleans(),
    origin=st.none() | origins(),
    finite_in_float32=st.none() | st.booleans(),
    gradient_fits=st.none() | st.booleans(),
    good_loss=st.none() | loss,
    good_finite=st.none() | st.booleans(),
    moved_alone=st.none() | st.booleans(),
    change=st.none() | st.builds(Change, st.just("parameter w"), number, number, positive),
    norm=st.none() | positive,
    norms=st.sampled_from([(), (("a", 3.0), ("b", 0.0)), (("a", 3e9), ("b", 2.0))]),
)
evidences = st.builds(
    Evidence,
    step=st.integers(300, 400),
    healthy_steps=st.integers(0, 300),
    healthy_since_restore=st.none() | st.integers(0, 300),
    corrupt=st.none() | st.just("parameter w"),
    jump=st.none() | st.just("parameter w"),
    batch_finite=st.none() | st.booleans(),
    comparison=st.none() | st.builds(Comparison, loss, loss, st.none() | st.booleans()),
    first=number,
    loss_unit=positive,
    growth=st.floats(1, 1e6),
    trial=st.none()
    | st.builds(Trial, st.sampled_from([0.0, 0.4, 1.2]), st.sampled_from(["start", "best"]), st.sampled_from([1 / 4])),
    climbing=st.booleans(),
    redone=st.booleans(),
    rate_rose=st.booleans(),
    levels=st.sampled_from([(), (None,), (0.4, None)]),
    usual_norm=st.none() | positive | st.just(0.0),
    lr=st.none() | any_rate,
    highest_lr=st.none() | any_rate,
    first_lr=st.none() | any_rate,
    group_lr=st.none() | any_rate,
    undo=st.booleans(),
)
curvatures = st.builds(
    Curvature,
    slope=positive,
    bend=number,
    steepest=st.none() | positive,
    typical=st.none() | positive,
    largest=st.none() | positive,
    smallest=st.none() | number,
)
courses = st.builds(
    Course,
    updates=st.integers(1, 1000),
    first=number,
    before=number,
    now=number,
    spread=positive,
    norm=positive,
    opposed=st.none() | st.floats(-1, 1),
    noise=st.none() | positive,
    batches=st.integers(0, 64),
    clear=positive,
    lr=st.none() | rate,
    batch_size=st.none() | st.integers(1, 64),
)
layers = st.builds(
    Layer,
    path=st.sampled_from(["net.0", "net.2"]),
    kind=st.just("Linear"),
    inputs=st.none() | positive,
    outputs=st.none() | positive,
    saturated=st.none() | st.floats(0, 1),
    dead=st.none() | st.floats(0, 1),
    gradient=st.none() | positive,
    weight=st.none() | positive,
    update=st.none() | positive,
)
objectives = st.builds(
    Objective,
    function=st.sampled_from(["cross_entropy", "mse_loss", "binary_cross_entropy"]),
    classes=st.none() | st.integers(2, 9),
    probabilities=st.booleans(),
    value=st.none() | positive,
    chance=st.none() | positive,
)
models = st.builds(
    Model,
    layers=st.lists(layers, max_size=4).map(tuple),
    objective=st.none() | objectives,
    loss=st.none() | loss,
    updates=st.integers(0, 3),
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A case of any kind, after a case of any kind."""
    fault = draw(st.sampled_from(FAULTS))
    if fault is not NO_FAULT:
        fault = replace(fault, value=draw(st.none() | loss))
    parts: dict[str, Any] = {
        "model": draw(st.none() | models),
        "course": draw(st.none() | courses),
        "curvature": draw(st.none() | curvatures),
        "unstable": draw(st.sampled_from(["", "the momentum is 1.1: it adds up. Use a momentum below 1"])),
    }
    earlier = tuple(
        EarlierFinding(draw(st.integers(1, 299)), fault.kind, fault.place, one, draw(st.none() | rate))
        for one in draw(st.sampled_from(EARLIER))
    )
    return Case(fault, draw(evidences), draw(clues), earlier=earlier, **parts)


EARLIER: list[tuple[Finding, ...]] = [
    (),
    (Finding("log_of_zero", 0.85, scope="batch"),),
    (Finding("corrupted_state", 0.9, place="parameter w", scope="state"),),
    (Finding("learning_rate_too_high", 0.9, {"largest_rate": 0.01}, scope="learner"),),
    (Finding("collapsed", 0.8, scope="learner"),),
]


def asks_for_a_lower_rate(text: str) -> bool:
    return re.search(r"[Ll]ower (it\b|the (learning )?rate|learning rate)", text) is not None


def suggested_rates(text: str) -> list[float]:
    """Rates that a suggestion names, of those to go to."""
    begins = re.search(r"ower (it|the)\b", text)
    advice = text[0 if begins is None else begins.start() :]
    return [float(one) for one in re.findall(r"(?:below|to about|to|;) ([-\d.e+]+)(?= lowers|;|,| for|\.$)", advice)]


def check(finding: Finding, case: Case) -> None:
    text, evidence = finding.suggestion, finding.evidence
    assert text
    assert "None" not in text, text
    assert not re.search(r"\bnan\b", text.replace("is nan", "")), text
    lr, allowed = evidence.get("lr"), evidence.get("largest_rate")
    best = finding.cause == "oscillation"
    if asks_for_a_lower_rate(text) and isinstance(lr, float) and isinstance(allowed, float):
        assert allowed / (1 + best) < lr, text
    if asks_for_a_lower_rate(text) and isinstance(lr, float):
        assert all(0 < one < lr * 1.01 for one in suggested_rates(text)), text
    if finding.cause == "learning_rate_too_high" and case.curvature is not None and isinstance(lr, float):
        assert case.curvature.largest_rate is None or case.curvature.largest_rate < lr or rate_is_shown(case)
    compared = re.search(r"loss of this batch is (\S+), under the last good weights (\S+?)(?:;|\. )", text)
    if compared:
        assert not float(compared[1]) <= float(compared[2]), text
    clip = re.search(r"gradient_clip_val=([-\d.e+]+)\)", text)
    if clip and isinstance(norm := evidence.get("gradient_norm"), float):
        assert float(clip[1]) > 0
        assert not norm < float(clip[1]) * 0.95, text
    exponent = re.search(r"was given (\S+), and the limit in float\d+ is about (\d+)", text)
    if exponent:
        assert float(exponent[1]) >= float(exponent[2]), text
    domain = re.search(r"from (\S+) to (\S+?), .* needs numbers above 0", text)
    if domain:
        assert float(domain[1]) <= 0 or ("and below 1" in text and float(domain[2]) >= 1), text
    assert ("test the device" in text.lower()) <= (finding.cause == "corrupted_state" and evidence["times"] >= 2), text  # type: ignore[operator]
    tried = re.search(r"a restart with (\S+) times the rate has", text)
    if tried and isinstance(lr, float):
        # The rate that was shown to be ahead is the one to go to.
        assert suggested_rates(text) in ([], [pytest.approx(lr * float(tried[1]), rel=0.1)]), text
    larger = re.search(r"was given (\S+), where it needs|given numbers from (\S+) to (\S+), where it needs", text)
    if larger and "between -1 and 1" in text and larger[2]:
        assert float(larger[2]) < -1 or float(larger[3]) > 1, text
    if larger and "above -1 and below 1" in text and larger[2]:
        assert float(larger[2]) <= -1 or float(larger[3]) >= 1, text
    assert ("larger than" in text) <= ("where it needs" not in text), text
    if case.clues.origin is not None and case.clues.origin.given:
        assert "every target of the batch is ignored" not in text
    assert ("finite in float32" in text) <= (case.clues.finite_in_float32 is True), text
    assert ("fits in float32" in text) <= (case.clues.gradient_fits is True), text
    assert "float32, whose largest number is 65,504" not in text
    if case.model is not None and not case.model.updates and finding.cause == "dead_relu":
        assert not asks_for_a_lower_rate(text), text
    size = re.search(r"with (\d+) samples? in a batch.* of about (\d+)", text)
    if size:
        assert int(size[2]) > int(size[1]), text


def rate_is_shown(case: Case) -> bool:
    """Whether a trial, or weights that grew until numbers gave out, show that the rate is too high."""
    tried = case.evidence.trial is not None and case.evidence.trial.lacks > 0
    return tried or (case.fault.certain and case.evidence.growth > DEFAULT.learner.ruined)


@settings(max_examples=1000, deadline=None)
@given(cases())
def test_a_suggestion_agrees_with_its_evidence(case: Case) -> None:
    """No lower rate where the allowed one is higher, no numbers that belie the sentence around them."""
    for finding in RuleSet().findings(case):
        check(finding, case)


@settings(max_examples=300, deadline=None)
@given(cases(), st.floats(1e-3, 0.9))
def test_a_record_agrees_with_itself(case: Case, factor: float) -> None:
    """What is done about a fault does not contradict what is said of it: a rate is not cut that is not blamed."""
    found = RuleSet().findings(case)
    finding = found[0] if found else None
    lr = case.evidence.lr
    lr = lr if lr is not None and 0 < lr < faults.INF else 0.1
    plan = spare_rate((Restore(0), Clip(1.0), Scale(factor)), finding, case.evidence)
    plan = within_curvature(plan, finding, lr)
    scale = next((step for step in plan if isinstance(step, Scale)), None)
    after = lr if scale is None else lr * min(scale.factor, scale.most)
    words = ("restore", "clip", "scale") if scale is not None else ("restore", "clip")
    cause = None if finding is None else finding.cause
    record = Intervention(1, 0, 1, case.fault.kind, "loss", words, lr, after, finding=finding, cause=cause)
    assert Intervention.from_dict(record.to_dict()).to_dict() == record.to_dict()
    line = tell_again(record)
    assert (" → " in line) == (scale is not None)
    fares_no_better = case.evidence.comparison is None
    blamed = finding is not None and finding.scope == "batch"
    if blamed and fares_no_better and not case.evidence.climbing and not case.evidence.rate_rose:
        assert scale is None, line


def test_every_part_of_a_case_is_drawn() -> None:
    """A part that is added to a case is added to the cases above."""
    assert {field.name for field in fields(Case)} == {
        *("fault", "evidence", "clues", "model", "course", "curvature", "earlier", "unstable")
    }

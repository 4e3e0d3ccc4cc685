"""Incidents that another version of the package wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_nanguard import Case, Comparison, Evidence, Fault
from lightning_nanguard.diagnosis.bundle import Bundle, read, write
from lightning_nanguard.diagnosis.rule_set import RuleSet
from lightning_nanguard.state.batch_history import MicroBatch

# What version 0.1.0 wrote of a fault and its evidence, as far as it matters here.
FAULT = {"kind": "exploding_loss", "scope": "learner", "place": "loss", "value": {"number": "inf"}, "message": "",
         "doubtful": False, "since": None}  # fmt: skip
EVIDENCE = {"step": 7, "first": 2.3, "scale": 0.5, "levels": [1.0, None], "comparison": {"now": 9.0, "then": 1.0},
            "usual_norm": {"number": "inf"}, "gone": [1, 2]}  # fmt: skip


def written(folder: Path, **changed: Any) -> Path:
    """A bundle in a folder, of which parts are replaced by what another version wrote."""
    folder.mkdir()
    micro = MicroBatch(3, 2, torch.ones(2), (torch.get_rng_state(),))
    fault = Fault("non_finite_loss", "batch", "loss")
    write(Bundle("m:C", {"a": 1}, fault, Evidence(3), None, [micro], {"w": torch.ones(3)}), folder)
    path = folder / "bundle.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    return folder


def test_a_bundle_of_the_version_before_is_read(tmp_path: Path) -> None:
    """The former name of a field is known, other keys are ignored, and what is missing has its default."""
    bundle = read(written(tmp_path / "old", schema=1, fault=FAULT, evidence=EVIDENCE))
    assert bundle.evidence == Evidence(
        7, first=2.3, loss_unit=0.5, levels=(1.0, None), comparison=Comparison(9.0, 1.0), usual_norm=float("inf")
    )
    # Without its traits the fault would be judged as one of another kind.
    expected = Fault("exploding_loss", "learner", "loss", float("inf"), certain=False, clipping_helps=True)
    assert bundle.fault == expected
    assert torch.equal(bundle.state["w"], torch.ones(3))


@pytest.mark.parametrize(
    ("kind", "scope", "place", "cause"),
    [
        ("loss_scale_collapse", "learner", "gradient", "low_precision_overflow"),
        ("gradient_spike", "batch", "gradient", "exploding_gradient"),
        ("overshoot", "learner", "loss", "learning_rate_too_high"),
        ("implausible_state", "state", "buffer b", "corrupted_state"),
        ("mine", "learner", "loss", "learning_rate_too_high"),
    ],
)
def test_the_cause_of_an_old_incident_is_as_it_was(
    kind: str, scope: str, place: str, cause: str, tmp_path: Path
) -> None:
    """Rules judge a fault by its traits, which the version before did not write."""
    fault = {**FAULT, "kind": kind, "scope": scope, "place": place, "value": 1e9}
    bundle = read(written(tmp_path / "old", schema=1, fault=fault))
    finding = RuleSet().diagnose(Case(bundle.fault, bundle.evidence))
    assert finding is not None
    assert finding.cause == cause


def test_traits_that_were_written_stand(tmp_path: Path) -> None:
    """In the present version a fault is as it was, whatever its name."""
    fault = {**FAULT, "certain": True, "clipping_helps": False}
    assert read(written(tmp_path / "new", fault=fault)).fault == Fault(
        "exploding_loss", "learner", "loss", float("inf")
    )


def test_a_later_version_is_refused(tmp_path: Path) -> None:
    """The error says what to do."""
    with pytest.raises(ValueError, match="written by a later version: update lightning-nanguard"):
        read(written(tmp_path / "later", schema=4))

"""The faults of the rules' tests, with the traits that the built-in detectors give them, and what they rest on."""

from __future__ import annotations

import math
from typing import Any

from lightning_nanguard import Case, Change, Clues, Comparison, Evidence, Fault, Origin, Range
from lightning_nanguard.diagnosis.rule_set import RuleSet
from lightning_nanguard.diagnosis.rules import RULES

NAN, INF = math.nan, math.inf

LOSS = Fault("non_finite_loss", "batch", "loss", NAN, clipping_helps=True)
GRADIENT = Fault("non_finite_gradient", "batch", "gradient of w", NAN, clipping_helps=True)
SPIKE = Fault("gradient_spike", "batch", "gradient", 1e9, certain=False, clipping_helps=True)
OVERFLOW = Fault("gradient_overflow", "batch", "gradient", 1e20, clipping_helps=True)
EXPLODING = Fault("exploding_loss", "learner", "loss", 1e6, certain=False, clipping_helps=True)
STUCK = Fault("stuck_loss", "learner", "loss", 9.0, certain=False)
SCALER = Fault("loss_scale_collapse", "learner", "gradient", 0.5, proof="none")
BACK = Fault("collapsed", "learner", "loss", 2.31, certain=False)
FAR_OUT = Fault("implausible_state", "state", "buffer bn.running_var", rate_may_cause=True)
CORRUPTED = Fault("corrupted_state", "state", "buffer b")
LARGE = Fault("implausible_state", "state", "parameter w", rate_may_cause=True)
MOMENT = Fault("implausible_state", "state", "optimizer state exp_avg of w", rate_may_cause=True)

BY_HAND = {"comparable": False, "usual_norm": 6.0, "lr": 5.0}
"""What is known under manual optimization."""

MOVED = Change("parameter w", 0.1, 1e5, 1e-3)
WORSE, SAME = Comparison(INF, 1.0), Comparison(INF, INF)
NORMAL = Range("0", "float32", -3.0, 3.0, 0.0, 1.0)
PIXELS = Range("0", "float32", 0.0, 255.0, 120.0, 80.0)
FAR = Range("1", "float32", 0.0, 1e20, 1e18, 1e19, outliers=(4,), usual=2.0)
LOG = Origin("log", lowest=0.0, smallest=0.0)
EXP = Origin("exp", highest=100.0)

Row = tuple[str | None, Fault, dict[str, Any], Clues]
"""The surest cause, ``None`` for none; the fault; what else is known; what the batch shows."""


def surest_cause(fault: Fault, known: dict[str, Any], clues: Clues) -> str | None:
    """The surest cause of what is known, well into a run."""
    evidence = Evidence(**{"step": 50, "healthy_steps": 50, "loss_unit": 1.0, **known})
    finding = RuleSet().diagnose(Case(fault, evidence, clues))
    return None if finding is None else finding.cause


def rules_of(group: str) -> set[str]:
    """Names of the rules in one file, which are those of the causes they find."""
    return {rule.__name__ for rule in RULES if rule.__module__.endswith(f".{group}")}

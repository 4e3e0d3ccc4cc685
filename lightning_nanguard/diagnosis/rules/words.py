"""What several rules share: who is to blame, and how numbers and places are put into words."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_nanguard.decide.blame import learner_did_it
from lightning_nanguard.diagnosis.clues import Origin, Range
from lightning_nanguard.thresholds.decision import BlameThresholds
from lightning_nanguard.types import Evidence, Fault, Finding

PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "mul", "convolution", "linear", "square", "pow", "prod"})
"""What multiplies gradients on their way back."""


def sudden(fault: Fault) -> bool:
    return fault.scope == "batch"


def learner_diverged(fault: Fault, evidence: Evidence) -> bool:
    if fault.scope == "learner" and fault.kind != "loss_scale_collapse":
        return True
    if evidence.corrupt is not None:
        return evidence.climbing or evidence.rate_rose
    return worse(evidence) and (
        learner_did_it(evidence, BlameThresholds()) or (evidence.growth > 4 and evidence.jump is None)
    )


def worse(evidence: Evidence) -> bool:
    comparison = evidence.comparison
    if comparison is None or comparison.then_finite is False:
        return False  # of a batch that cannot be differentiated under good weights either, the loss says nothing
    return comparison.worse(0.1 * evidence.loss_unit)


def at(cause: str, confidence: float, origin: Origin, suggestion: str) -> Finding:
    return Finding(cause, confidence, origin_evidence(origin), origin.place, origin.samples, suggestion)


def origin_evidence(origin: Origin) -> dict[str, float | str]:
    numbers = {"lowest": origin.lowest, "highest": origin.highest}
    words: dict[str, float | str] = {
        "operation": origin.operation,
        "module": origin.module or "training_step",
        "pass": "backward" if origin.backward else "forward",
    }
    if origin.line:
        words["line"] = origin.line
    return words | {name: value for name, value in numbers.items() if value is not None}


def numbers_of(found: Range) -> dict[str, float | str]:
    return {"lowest": found.lowest, "highest": found.highest, "mean": found.mean, "std": found.std}


def outliers(cause: str, found: Range, cure: str) -> Finding:
    largest = max(abs(found.lowest), abs(found.highest))
    return Finding(
        cause,
        0.8,
        evidence=numbers_of(found),
        place=f"field {found.field} of the batch",
        samples=found.outliers,
        suggestion=(
            f"field {found.field} reaches {largest:.4g} in {listed('sample', found.outliers)} of this batch, where "
            f"a sample usually stays within {found.usual:.4g}. {cure}"
        ),
    )


def span(target: Range | None, origin: Origin) -> str:
    if target is not None:
        return f"targets run from {target.lowest:.4g} to {target.highest:.4g}"
    return f"what the target gives runs from {origin.lowest} to {origin.highest}"


def least(origin: Origin) -> str:
    if origin.lowest is not None and origin.lowest < 0:
        return f"{origin.lowest:.4g}"
    return "zero" if not origin.smallest else f"{origin.smallest:.4g}"


def of(samples: Sequence[int]) -> str:
    return f" of {listed('sample', samples)}" if samples else ""


def listed(noun: str, numbers: Sequence[int], at_most: int = 8) -> str:
    if not numbers:
        return ""
    if len(numbers) == 1:
        return f"{noun} {numbers[0]}"
    shown = [str(number) for number in numbers[:at_most]]
    if len(numbers) > at_most:
        return f"{noun}s {', '.join(shown)} and {len(numbers) - at_most:,} more"
    return f"{noun}s {', '.join(shown[:-1])} and {shown[-1]}"

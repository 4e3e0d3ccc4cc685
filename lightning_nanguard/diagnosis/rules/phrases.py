"""Puts numbers, samples and places of findings into words."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_nanguard.diagnosis.case import Case, Origin, Range
from lightning_nanguard.diagnosis.rules.domains import DOMAINS
from lightning_nanguard.record.text import joined
from lightning_nanguard.thresholds.fixed import NUMBERS_PER_MESSAGE
from lightning_nanguard.types import Finding

DRAWN = "drawn"
"""Key in the evidence of a finding about a fault that comes from random numbers and not from the samples."""


def finding_at(cause: str, confidence: float, origin: Origin, suggestion: str) -> Finding:
    """A finding about the operation that computed the first non-finite value."""
    return Finding(cause, confidence, origin_evidence(origin), origin.place, origin.samples, suggestion, scope="batch")


def drawn_at(cause: str, confidence: float, case: Case, suggestion: str) -> Finding:
    """A finding about a fault that other random numbers remove, so that no sample is bad."""
    origin = case.clues.origin
    evidence = {DRAWN: 1.0} | ({} if origin is None else origin_evidence(origin))
    place = case.fault.place if origin is None else origin.place
    return Finding(cause, confidence, evidence, place, suggestion=suggestion, scope="batch")


def origin_evidence(origin: Origin) -> dict[str, float | str]:
    """The numbers of an operation."""
    numbers = {"lowest": origin.lowest, "highest": origin.highest}
    words: dict[str, float | str] = {
        "operation": origin.operation,
        "module": origin.module or "training_step",
        "pass": "backward" if origin.backward else "forward",
    }
    if origin.line:
        words["line"] = origin.line
    return words | {name: value for name, value in numbers.items() if value is not None}


def range_evidence(found: Range) -> dict[str, float | str]:
    """The numbers of a tensor of the batch."""
    return {"lowest": found.lowest, "highest": found.highest, "mean": found.mean, "std": found.std}


def outlier_finding(cause: str, confidence: float, found: Range, remedy: str) -> Finding:
    """A finding about numbers that are far larger than in the other samples, or else in the batches before."""
    evidence = range_evidence(found)
    if found.outliers:
        where = (
            f"{listed('sample', found.outliers)} of this batch, and no more than {found.usual:.4g} in magnitude in "
            "half of its samples."
        )
    else:
        evidence["before"] = found.before
        where = (
            f"this batch, and at most {found.before:.4g} in magnitude in the batches before: it may be in other units."
        )
    field, furthest = f"field {found.field}", max(found.highest, found.lowest, key=abs)
    text = f"{field} reaches {furthest:.4g} in {where} {remedy}"
    return Finding(cause, confidence, evidence, f"{field} of the batch", found.outliers, text, scope="batch")


def target_span(target: Range | None, origin: Origin) -> str:
    """The range of the targets, or of an operation's input that was computed from them."""
    domain = DOMAINS.get(origin.operation)
    if target is not None and domain is not None and domain.leaves(target.lowest, target.highest):
        return f"targets run from {target.lowest:.4g} to {target.highest:.4g}"
    return f"what is computed from the targets runs from {origin.lowest:.4g} to {origin.highest:.4g}"


def smallest_operand(origin: Origin) -> str:
    """The smallest input of an operation; the one of smallest magnitude if none is below zero."""
    if origin.lowest is not None and origin.lowest < 0:
        return f"{origin.lowest:.4g}"
    return "zero" if not origin.smallest else f"{origin.smallest:.4g}"


def of_samples(samples: Sequence[int]) -> str:
    """Samples in words, such as `` of samples 3 and 17``; empty without samples."""
    return f" of {listed('sample', samples)}" if samples else ""


def listed(noun: str, numbers: Sequence[int]) -> str:
    """A noun with numbers, such as ``samples 3, 17 and 20``; empty without numbers.

    Example:
        >>> listed("sample", (3, 17))
        'samples 3 and 17'
    """
    if not numbers:
        return ""
    return f"{noun}{'s' if len(numbers) > 1 else ''} {joined(list(map(str, numbers)), NUMBERS_PER_MESSAGE)}"

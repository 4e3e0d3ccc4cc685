"""Detects batches that repeat within one epoch."""

from __future__ import annotations

from lightning_nanguard.diagnosis.mistakes.observation import Observation
from lightning_nanguard.thresholds.diagnosis import DiagnosisThresholds
from lightning_nanguard.types import Finding


def data_repeats(seen: Observation, thresholds: DiagnosisThresholds) -> Finding | None:
    """Many batches of one epoch are the same."""
    limits = thresholds.mistakes
    if seen.batches < limits.least_batches or seen.batches - seen.distinct < limits.repeated * seen.batches:
        return None
    return Finding(
        "data_repeats",
        thresholds.confidence.mistake,
        evidence={"batches": float(seen.batches), "distinct": float(seen.distinct)},
        place="the training data",
        suggestion=(
            f"only {seen.distinct} of the first {seen.batches} batches of an epoch differ. Check the data set's "
            "__getitem__ (does it use its index?), the sampler, and whether each worker of an iterable data set "
            "reads its own part."
        ),
    )

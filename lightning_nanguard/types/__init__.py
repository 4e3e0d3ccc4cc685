"""The data that the folders of the package hand to each other: frozen, standard library only.

The order of a step is measure → detect → decide → act → record. A :class:`Reading` leaves *measure*, a
:class:`Fault` leaves *detect*, a :data:`Plan` leaves *decide*, and an :class:`Intervention` is what *record* keeps.
"""

from __future__ import annotations

from lightning_nanguard.types.evidence import Comparison, Evidence, Trial
from lightning_nanguard.types.faults import Fault, Proof, Reading, Scope
from lightning_nanguard.types.plan import (
    ActOn,
    Clip,
    DropMoments,
    Plan,
    PlanStep,
    Restore,
    RestoreAverages,
    RestoreScale,
    Role,
    Scale,
    Skip,
    Stop,
)
from lightning_nanguard.types.records import (
    SCHEMA_VERSION,
    SUSPICION,
    Advice,
    Finding,
    Intervention,
    Kind,
    Record,
    Row,
    Verdict,
    from_plain,
    plain,
)

__all__ = [
    "SCHEMA_VERSION",
    "SUSPICION",
    "ActOn",
    "Advice",
    "Clip",
    "Comparison",
    "DropMoments",
    "Evidence",
    "Fault",
    "Finding",
    "Intervention",
    "Kind",
    "Plan",
    "PlanStep",
    "Proof",
    "Reading",
    "Record",
    "Restore",
    "RestoreAverages",
    "RestoreScale",
    "Role",
    "Row",
    "Scale",
    "Scope",
    "Skip",
    "Stop",
    "Trial",
    "Verdict",
    "from_plain",
    "plain",
]

"""A remedy that writes a line to a file at every fault."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightning_nanguard import Evidence, Fault, PlanStep, Remedy, RunControl


@dataclass(frozen=True)
class Note(PlanStep):
    """Write a line of text."""

    text: str


class WriteNote(Remedy):
    """Appends a line to a file at every fault. Its plan step is a class of its own, so its role is ``notify``.

    Args:
        path: The file.
    """

    word, step = "note", Note

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def propose(self, fault: Fault, evidence: Evidence, attempt: int) -> PlanStep | None:
        """A line about the fault."""
        return Note(f"update {evidence.step}: {fault.message}")

    def apply(self, step: PlanStep, run: RunControl) -> None:
        """Append the line."""
        assert isinstance(step, Note)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(step.text + "\n")

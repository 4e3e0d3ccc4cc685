"""Receipts, which say whether an intervention in a run with finite numbers helped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final, get_args

from lightning_nanguard.record.files import float_or_none
from lightning_nanguard.record.text import counted, printable
from lightning_nanguard.types import Intervention, Record, Verdict, from_plain

RECEIPTS_FILE = "receipts.jsonl"
"""Name of the file in a run's folder of records."""

_WORDS: dict[Verdict, str] = {
    "gained": "helped",
    "cost": "did harm",
    "no difference": "made no clear difference",
    "not measured": "not measured",
}


@final
@dataclass(frozen=True, slots=True)
class Receipt(Record):
    """Says whether one intervention in a run with finite numbers helped.

    Attributes:
        intervention_step: ``global_step`` of the intervention.
        global_step: ``global_step`` of the comparison.
        verdict: The result of the comparison.
        loss: Median loss of the run on the batches that were compared; ``None`` if nothing was.
        loss_without: The same for the branch, that is, the run without the intervention.
        updates: Number of updates from the intervention to the comparison.
        taken_back: Whether the intervention was reversed: the run goes on from the branch.
        reason: Why nothing was measured, or why a difference does not count.
        run: Id of the run.

    Example:
        >>> print(Receipt(80, 208, "gained", 0.52, 2.31, 128).in_words())
        helped: 128 updates later the loss is 0.52, and 2.31 without it on the same batches
    """

    intervention_step: int
    global_step: int
    verdict: Verdict
    loss: float | None = None
    loss_without: float | None = None
    updates: int = 0
    taken_back: bool = False
    reason: str = ""
    run: str = field(default="", compare=False)

    def in_words(self) -> str:
        """The result of the intervention, in one sentence."""
        if self.loss is None or self.loss_without is None:
            return printable(f"{_WORDS[self.verdict]}: {self.reason}")
        losses = f"the loss is {self.loss:.4g}, and {self.loss_without:.4g} without it on the same batches"
        ended = "; it was taken back" if self.taken_back else f"; {self.reason}" if self.reason else ""
        return printable(f"{_WORDS[self.verdict]}: {counted(self.updates, 'update')} later {losses}{ended}")

    def told(self) -> str:
        """The intervention and its result, in one line."""
        return f"result of the intervention of step {self.intervention_step}: {self.in_words()}"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Receipt:
        """The inverse of :meth:`to_dict`; keys of later versions are ignored.

        Raises:
            ValueError: If ``data`` is not a receipt.
        """
        receipt = from_plain(cls, data, "receipt", loss=float_or_none, loss_without=float_or_none)
        if receipt.verdict not in get_args(Verdict):
            raise ValueError(f"not a receipt: its verdict is {receipt.verdict!r}")
        return receipt


def receipt_of(intervention: Intervention, receipts: Sequence[Receipt]) -> Receipt | None:
    """The receipt of an intervention; ``None`` if there is none."""
    key = intervention.global_step, intervention.run
    changed = bool({"restore", "scale", "clip", "skip"} & set(intervention.remedies))
    return next((one for one in receipts if (one.intervention_step, one.run) == key), None) if changed else None

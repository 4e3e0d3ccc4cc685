"""A sink that keeps the newest interventions in memory."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final, overload

from lightning_nanguard.errors import require
from lightning_nanguard.record.base import Sink
from lightning_nanguard.record.html import interventions_table
from lightning_nanguard.record.receipts import Receipt
from lightning_nanguard.record.trials import HeldTrial
from lightning_nanguard.thresholds.records import RECORDS, RecordsThresholds
from lightning_nanguard.types import Advice, Intervention


@final
class Memory(Sink, Sequence[Intervention]):
    """Holds the newest interventions and the counts of all of them (``NaNGuard.interventions``).

    It behaves like a tuple: it equals any sequence of the same interventions, and a slice of it is a tuple. Only the
    guard writes to it. It is kept from one fit to the next.

    Args:
        thresholds: How many interventions are kept; older ones stay in the counts.

    Attributes:
        total: Number of all interventions written.
        faults: How often each fault was written.
        remedies: How often each remedy was written.
        advice: The advice of the last fit.
        receipts: The receipts of the last fit: whether interventions in a run with finite numbers helped.
        trials: The trials of the last fit, with what each of them showed.
        run: Further facts about the last fit, such as its folder and the number of updates.

    Example:
        >>> memory = Memory(RecordsThresholds(interventions_in_memory=2))
        >>> for step in range(5):
        ...     memory.write(Intervention(step, 0, step, "non_finite_loss", "loss", ("skip",), 0.1, 0.1))
        >>> len(memory), memory[-1].global_step, memory.total, memory.remedies["skip"]
        (2, 4, 5, 5)
    """

    every_rank = True

    def __init__(self, thresholds: RecordsThresholds = RECORDS) -> None:
        kept = thresholds.interventions_in_memory
        require(kept >= 1, thresholds, "interventions_in_memory", kept, "at least 1")
        self._newest: deque[Intervention] = deque(maxlen=kept)
        self.total = 0
        self.faults: Counter[str] = Counter()
        self.remedies: Counter[str] = Counter()
        self.advice: Sequence[Advice] = ()
        self.receipts: Sequence[Receipt] = ()
        self.trials: Sequence[HeldTrial] = ()
        self.run: Mapping[str, Any] = {}
        self._original: Memory | None = None

    def take_advice(
        self, advice: Sequence[Advice], receipts: Sequence[Receipt] = (), trials: Sequence[HeldTrial] = ()
    ) -> None:
        """Show the advice, the receipts and the trials of a new fit. Later ones are shown, too."""
        self.advice, self.receipts, self.trials = advice, receipts, trials
        if self._original is not None:
            self._original.take_advice(advice, receipts, trials)

    def take_run(self, run: Mapping[str, Any]) -> None:
        """Replace the facts about the last fit."""
        self.run = run
        if self._original is not None:
            self._original.take_run(run)

    def begin_fit(self, run: Mapping[str, Any], updates: int) -> None:
        """A fit begins after ``updates`` updates of the run: from now on, its counts are also kept separately."""
        self.take_run({**run, "before": (updates, dict(self.faults), dict(self.remedies))})

    def of_fit(self) -> tuple[int, Counter[str], Counter[str]]:
        """Number of updates before the newest fit, and the faults and remedies of this fit only."""
        updates, faults, remedies = self.run.get("before", (0, {}, {}))
        return updates, self.faults - Counter(faults), self.remedies - Counter(remedies)

    def add_to_run(self, **values: Any) -> None:
        """Add facts about the same fit."""
        self.take_run({**self.run, **values})

    def copy(self) -> Memory:
        """A copy with the same interventions. This memory also shows what is later written to the copy."""
        made = Memory(RecordsThresholds(interventions_in_memory=self.maxlen))
        made.load_state_dict(self.state_dict())
        made._original = self
        return made

    def state_dict(self) -> dict[str, Any]:
        """All it holds, in plain containers."""
        return {
            "kept": self.maxlen,
            "newest": list(self._newest),
            "total": self.total,
            "faults": dict(self.faults),
            "remedies": dict(self.remedies),
            "run": dict(self.run),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._newest = deque(state["newest"], maxlen=state["kept"])
        self.total = int(state["total"])
        self.faults, self.remedies = Counter(state["faults"]), Counter(state["remedies"])
        self.run = state.get("run", {})  # pickles of earlier versions lack it

    @property
    def maxlen(self) -> int:
        """How many interventions are kept."""
        return self._newest.maxlen or 0

    def write(self, intervention: Intervention) -> None:
        """Keep the intervention in place of the oldest."""
        self._newest.append(intervention)
        self.total += 1
        self.faults[intervention.fault] += 1
        self.remedies.update(intervention.remedies)
        if self._original is not None:
            self._original.write(intervention)

    def __len__(self) -> int:
        return len(self._newest)

    @overload
    def __getitem__(self, index: int) -> Intervention: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Intervention, ...]: ...
    def __getitem__(self, index: int | slice) -> Intervention | tuple[Intervention, ...]:
        return tuple(self._newest)[index] if isinstance(index, slice) else self._newest[index]

    def __iter__(self) -> Iterator[Intervention]:
        # Copied, because the guard may write while the user iterates.
        return iter(tuple(self._newest))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Sequence) and not isinstance(other, (str, bytes)):
            return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def _repr_html_(self) -> str:
        return interventions_table(tuple(self), self.total)

    def __repr__(self) -> str:
        older = self.total - len(self)
        return f"Memory({list(self._newest)}{f', and {older} older' if older else ''})"

"""The results of the trials that ran beside a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, final, get_args

from lightning_nanguard.record.text import counted, in_words, printable
from lightning_nanguard.types import Record, from_plain

TRIALS_FILE = "trials.jsonl"
"""Name of the file in a run's folder of records."""

Outcome = Literal["confirmed", "not confirmed", "no result"]
"""Whether a trial confirmed the suspicion that it was held because of."""


@final
@dataclass(frozen=True, slots=True)
class HeldTrial(Record):
    """The result of one trial. A trial that does not confirm its suspicion changes nothing.

    Attributes:
        begun_step: ``global_step`` at which it began.
        global_step: ``global_step`` at which it ended.
        fault: Kind of the suspicion.
        outcome: Whether it confirmed the suspicion.
        lacks: Share of what can be learned that the run lacks; 0 if the suspicion was not confirmed.
        factor: Factor on the learning rate in the best arm.
        reason: Why there is no result.
        run: Id of the run.

    Example:
        >>> HeldTrial(40, 104, "stuck_loss", "not confirmed").told()[-74:]
        'no restart at a lower learning rate was clearly ahead; nothing was changed'
    """

    begun_step: int
    global_step: int
    fault: str
    outcome: Outcome
    lacks: float = 0.0
    factor: float = 1.0
    reason: str = ""
    run: str = field(default="", compare=False)

    def told(self) -> str:
        """The result in one line."""
        return printable(
            f"trial of steps {self.begun_step} to {self.global_step} ({in_words(self.fault)}): {self._shown()}"
        )

    def _shown(self) -> str:
        if self.outcome == "confirmed":
            ahead = f"a restart at {self.factor:.3g} times the learning rate was clearly ahead"
            return f"{ahead}; the run lacked {self.lacks:.0%} of what it could learn"
        if self.outcome == "no result":
            return f"it ended without a result, because {self.reason}; nothing was changed"
        return "no restart at a lower learning rate was clearly ahead; nothing was changed"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> HeldTrial:
        """The inverse of :meth:`to_dict`; keys of later versions are ignored.

        Raises:
            ValueError: If ``data`` is not a trial.
        """
        trial = from_plain(cls, data, "trial", lacks=float, factor=float)
        if trial.outcome not in get_args(Outcome):
            raise ValueError(f"not a trial: its outcome is {trial.outcome!r}")
        return trial


def trials_in_words(trials: Sequence[HeldTrial]) -> str:
    """The number of trials, and how many of them had which outcome; ``""`` without a trial.

    Example:
        >>> trials_in_words([HeldTrial(40, 104, "stuck_loss", "not confirmed")])
        '1 trial held (steps 40 to 104), which confirmed nothing and changed nothing'
    """
    if not trials:
        return ""
    reasons = "; ".join(dict.fromkeys(one.reason for one in trials if one.outcome == "no result"))
    words: dict[Outcome, str] = {
        "confirmed": "confirmed the suspicion",
        "not confirmed": "confirmed nothing",
        "no result": f"ended without a result ({reasons})",
    }
    counts = Counter(one.outcome for one in trials)
    held = f"{counted(len(trials), 'trial')} held (steps {trials[0].begun_step} to {trials[-1].global_step})"
    if len(counts) == 1 and "confirmed" not in counts:
        return f"{held}, which {words[trials[0].outcome]} and changed nothing"
    each = ", ".join(f"{counts[outcome]:,} {told}" for outcome, told in words.items() if counts[outcome])
    rest = "; the others changed nothing" if "confirmed" in counts and len(counts) > 1 else ""
    return f"{held}, of which {each}{rest}"

"""How a trial is made, and what it has to show."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TrialThresholds"]


@dataclass(frozen=True)
class TrialThresholds:
    """How a trial is made, and what it has to show.

    The shares and the numbers of updates and batches are those of a study of 293 runs of 64 tasks (171 healthy ones, of
    which one was touched and none harmed).

    Attributes:
        factors: What the learning rate is multiplied by in each arm, those first that were best most often: there are
            as many arms as there is room for.
        least_factor: The lowest factor that is tried where even the lowest of these makes the loss worse.
        picked_after: Updates after which the best arms are picked.
        picked: Arms that go on from there: the best one and those at the next lower rates, for a larger rate is ahead
            at first more often than in the end.
        updates: Updates after which it is judged. What an intervention gained or cost is judged then, and again at
            doubling distances.
        judged_part: The newest batches, one in so many, judge the states.
        signs: Share of the batches that have to agree on which of two states is better.
        lacks: Share of what can be learned that a run has to lack.
        lost: Share of what was learned that a run has to have lost, to be worse than it was.
        in_a_row: Trials in a row that have to speak against the run, and judgements in a row of what an intervention
            gained or cost that have to agree.
        plain: Share of what can be learned that is so large that one trial is enough.
        near: Factors of the best arm's rate with which a second trial goes on, so that the best of them is taken.
        most_share: Share of the run's updates that arms may make in all, where a mere plateau is tried again at the
            same rate.
        risen: Times the rate of the newest trial to which the rate has to have risen since, to be another one: the
            ratio of neighbouring arms.
        memory_share: Share of the free memory that the states compared in a trial may take together, its arms included.
    """

    factors: tuple[float, ...] = (1 / 64, 1 / 16, 1 / 256, 1 / 4)
    least_factor: float = 1 / 65536
    picked_after: int = 16
    picked: int = 2
    updates: int = 64
    judged_part: int = 3
    signs: float = 0.8
    lacks: float = 0.1
    lost: float = 0.3
    in_a_row: int = 2
    plain: float = 0.5
    near: tuple[float, ...] = (1.0, 1 / 2, 1 / 4, 2.0)
    most_share: float = 0.02
    risen: float = 4.0
    memory_share: float = 0.25

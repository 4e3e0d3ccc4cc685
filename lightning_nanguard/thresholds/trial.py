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
        factors: Factor on the learning rate in each arm. There are as many arms as memory allows, and the factors that
            were best most often come first.
        least_factor: The lowest factor that is tried, if even the lowest of these makes the loss worse.
        picked_after: Updates after which the best arms are picked. As many updates a copy at the present rate makes
            beside the run, to be compared with it.
        picked: Number of arms that go on from there: the best one, and those at the next lower rates, because a larger
            rate is ahead early more often than late. If there is none, those at the next higher rates.
        updates: Updates after which a trial is judged. After half of them it ends early if the run lacks a plain share
            already, and one arm is clearly the best. A receipt is decided after as many updates for the first time, and
            then at doubling distances.
        kept_every: Updates of the arms after which a batch is kept. The arm must lead on the kept batches, too, because
            in ordered data the newest batches may all be of one kind.
        judged_part: The newest batches, one in so many, on which the states are compared.
        left_out: Share of the batches that a comparison of two states leaves out: those that speak most for the better
            one. So a few outliers decide nothing, and a loss that is 0 on half of the batches can be compared, too. Of
            20,000 trials of losses that differ by chance alone, 0.3 % confirm a suspicion.
        left_out_early: The same share for an early end, which has half as many batches. There it is 0.04 %.
        lacks: Share of what can be learned that a run has to lack.
        lost: Share of what was learned that a run has to have lost to be worse than before.
        in_a_row: Trials in a row that have to speak against the run, and comparisons in a row that a receipt needs.
        plain: Share of what can be learned at which one trial, or one comparison of a receipt, is enough.
        near: Factors on the best arm's rate in a second trial.
        most_share: Share of the run's updates that arms may make in all, if a loss that looks normal is tried again at
            the same rate.
        changed: Factor by which the rate has to have risen since the newest trial, above all rates before it, for
            another one, or fallen since the best state for an arm that continues from it. It is the ratio of
            neighbouring arms.
        memory_share: Share of the free memory that the states compared in a trial may take together, arms included.
        alike: Share of the way of the run in one update by which a copy at the present rate may be off. On the CPU it
            is 0 in practice; kernels that are not deterministic, and sums over ranks, add rounding.
    """

    factors: tuple[float, ...] = (1 / 64, 1 / 16, 1 / 256, 1 / 4)
    least_factor: float = 1 / 65536
    picked_after: int = 16
    picked: int = 2
    updates: int = 64
    kept_every: int = 8
    judged_part: int = 3
    left_out: float = 0.2
    left_out_early: float = 0.5
    lacks: float = 0.1
    lost: float = 0.3
    in_a_row: int = 2
    plain: float = 0.5
    near: tuple[float, ...] = (1.0, 1 / 2, 1 / 4, 2.0)
    most_share: float = 0.02
    changed: float = 4.0
    memory_share: float = 0.25
    alike: float = 0.05

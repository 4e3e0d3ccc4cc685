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
        batches: Newest healthy batches that are kept for trials.
        least_batches: Fewest batches with which a trial is made; fewer do not tell a share from noise.
        judged_part: The newest batches, one in so many, judge the states; no arm is trained on them.
        chosen_part: One in so many of the batches before them chooses among the arms; no arm is trained on them either.
        factors: What the learning rate is multiplied by in each arm.
        least_factor: The lowest factor that is tried where even the lowest of these makes the loss worse.
        picked_after: Updates after which the best arm is picked.
        updates: Updates after which it is judged.
        signs: Share of the batches that have to agree on which of two states is better.
        lacks: Share of what can be learned that a run has to lack.
        lost: Share of what was learned that a run has to have lost, to be worse than it was.
        in_a_row: Trials in a row that have to speak against the run.
        plain: Share of what can be learned that is so large that one trial is enough.
        near: Factors of the best arm's rate, among which the rate to go on with is chosen.
        live_bytes: Bytes that a trial beside the run may take for the states it compares, those of its arms included.
        factors_by_use: The factors of such a trial, those first that were best most often: it has as many arms as fit.
    """

    batches: int = 48
    least_batches: int = 12
    judged_part: int = 3
    chosen_part: int = 6
    factors: tuple[float, ...] = (1 / 4, 1 / 16, 1 / 64, 1 / 256)
    least_factor: float = 1 / 65536
    picked_after: int = 16
    updates: int = 64
    signs: float = 0.8
    lacks: float = 0.1
    lost: float = 0.3
    in_a_row: int = 2
    plain: float = 0.5
    near: tuple[float, ...] = (1.0, 2.0, 1 / 2)
    live_bytes: int = 2 << 30
    factors_by_use: tuple[float, ...] = (1 / 64, 1 / 16, 1 / 256, 1 / 4)

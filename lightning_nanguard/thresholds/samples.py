"""When a single sample of a batch counts as bad, and how it is searched for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SamplesThresholds:
    """When a single sample of a batch counts as bad, and how it is searched for.

    Attributes:
        far_factor_in_batch: Times the usual largest number of a sample from which on one is out of all proportion,
            where no healthy batches are there to compare with; heavy tails reach thousands.
        least_compared: Healthy batches, or samples of one batch, needed to compare with.
        most_runs: Passes over parts of one batch in which bad samples are searched for; 64 single ones among 1,024
            samples take more, a handful takes about 20 each.
        all_bad_after: Single samples, all over a batch, after which a search ends where nothing looked at was good.
        searches_in_vain: Searches in a row that explain nothing, after which only the 4th, 8th, 16th, … is made.
        largest_share: Share of a batch from which on not its samples are bad but something that all have in common.
        columns_named: Columns of one sample that are named at most.
        batches_waiting: Batches that Lightning may have taken from the loader and not trained on yet.
        separable_error: Relative difference up to which the loss of a batch is the weighted mean of its parts' losses;
            32-bit sums in another order differ by less.
        skipped_share: Share of skipped updates from which on the advice names ``keep_good_samples``.
        skipped_confidence: Confidence of that advice: a count of what was done.
        least_updates: Updates before that share is looked at.
        usual_share: Share of the samples that have the same shapes and dtypes, from which on others are named.
        checked_factor: Times the usual largest number of a field from which on ``nanguard check --data`` names a
            sample.
    """

    far_factor_in_batch: float = 1e6
    least_compared: int = 3
    most_runs: int = 256
    all_bad_after: int = 8
    searches_in_vain: int = 3
    largest_share: float = 0.5
    columns_named: int = 32
    batches_waiting: int = 8
    separable_error: float = 1e-3
    skipped_share: float = 0.1
    skipped_confidence: float = 0.9
    least_updates: int = 20
    usual_share: float = 0.9
    checked_factor: float = 1e3

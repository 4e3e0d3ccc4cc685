"""When a single sample of a batch counts as bad, and how it is searched for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SamplesThresholds:
    """When a single sample of a batch counts as bad, and how it is searched for.

    Attributes:
        far_factor_in_batch: How many times the usual largest number of its batch's samples puts a sample out of all
            proportion, where there are no healthy batches to compare with. Heavy tails reach thousands.
        least_compared: Healthy batches, or samples of one batch, needed to compare with.
        most_runs: Passes over parts of one batch after which a search for its bad samples is given up. One bad sample
            takes about 20; 64 of 1,024 take more than this.
        all_bad_after: Bad single samples, spread over the batch, after which a search ends if no part was good so far.
        searches_in_vain: Searches in a row that explain nothing, after which only the 4th, 8th, 16th, … is made.
        largest_share: Share of bad samples from which on the fault is not theirs, but of something all have in common.
        other_weights: Draws of signs for the weights under all of which a sample must be bad to be listed, where it
            shows nothing bad by itself. A number that the weights have made negative stays so in half of them.
        columns_named: Columns of one sample that are named at most.
        batches_waiting: Batches that Lightning may have taken from the loader and not trained on yet.
        separable_error: Relative difference up to which the loss of a batch is the weighted mean of its parts' losses;
            32-bit sums in another order differ by less.
        skipped_share: Share of skipped updates from which on the advice names ``keep_good_samples``.
        most_skipped: Share of skipped updates from which on an update is made from the good samples of its batch by
            default, since little is learned where most updates are skipped.
        skipped_confidence: Confidence of that advice: a count of what was done.
        least_updates: Updates before that share is looked at.
        usual_share: Share of the samples that have the same shapes and dtypes, from which on others are named.
        checked_factor: Factor on the usual largest number of a field from which on ``nanguard check --data`` names a
            sample.
    """

    far_factor_in_batch: float = 1e6
    least_compared: int = 3
    most_runs: int = 256
    all_bad_after: int = 8
    searches_in_vain: int = 3
    largest_share: float = 0.5
    other_weights: int = 4
    columns_named: int = 32
    batches_waiting: int = 8
    separable_error: float = 1e-3
    skipped_share: float = 0.1
    most_skipped: float = 0.5
    skipped_confidence: float = 0.9
    least_updates: int = 20
    usual_share: float = 0.9
    checked_factor: float = 1e3

"""When a single sample of a batch counts as bad, and how it is searched for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SamplesThresholds:
    """When a single sample of a batch counts as bad, and how it is searched for.

    Attributes:
        far_factor_in_batch: Factor on the median of the largest numbers of the samples in a batch, above which a sample
            is out of proportion. It applies if there are too few healthy batches to compare with. Heavy tails reach
            thousands.
        least_compared: Fewest healthy batches, or samples of one batch, to compare with.
        most_runs: Passes over parts of one batch after which the search for its bad samples ends without a result. One
            bad sample takes about 20; 64 of 1,024 take more than this.
        most_runs_ahead: Passes that searches without a result may take together before the first update. Each update
            adds one, so that they take at most about as long as the run.
        all_bad_after: Bad single samples, spread over the batch, after which a search ends if no part of the batch was
            good so far.
        searches_in_vain: Searches in a row without an explanation, after which only the 4th, 8th, 16th … is made.
        largest_share: Share of bad samples at which the samples are not blamed, but something that all have in common.
        other_weights: Random signs of the weights that are tried for a sample whose own numbers are not bad. It is
            listed only if it is bad with each of them. A number that the weights have made negative stays negative with
            half of them.
        columns_named: Largest number of columns of one sample that are named.
        batches_waiting: Batches that Lightning may have taken from the loader and not yet trained on.
        separable_error: Largest relative difference between the loss of a batch and the weighted mean of the losses of
            its parts, if they count as equal. 32-bit sums in another order differ by less.
        skipped_share: Share of skipped updates above which advice names ``keep_good_samples``.
        most_skipped: Share of skipped updates above which an update is made from the good samples of a bad batch by
            default.
        skipped_confidence: Confidence of that advice.
        least_updates: Updates before which these shares are not computed.
        usual_share: Share of the samples with the same shapes and dtypes at which other shapes and dtypes are reported.
        checked_factor: Factor on the usual largest number of a field above which ``nanguard check --data`` reports a
            sample.
    """

    far_factor_in_batch: float = 1e6
    least_compared: int = 3
    most_runs: int = 256
    most_runs_ahead: int = 1024
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

"""Bad samples are found by what they hold and by what parts of the batch do; good ones never are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf, nan

import pytest
import torch

from lightning_nanguard.diagnosis.bad_samples import (
    FAR,
    NOT_FINITE,
    SampleFault,
    SampleSearch,
    far_samples,
    non_finite_samples,
    search,
)
from lightning_nanguard.thresholds.samples import SamplesThresholds


def batch(size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    return torch.randn(size, 3, generator=source), torch.randn(size, generator=source)


def test_not_finite_in_inputs_and_targets() -> None:
    """Every sample with NaN or Inf is named, with the columns that hold it unless all do."""
    x, y = batch()
    x[1, 2], x[4], y[4], y[6] = nan, inf, nan, -inf
    assert non_finite_samples((x, y)) == {
        1: SampleFault(NOT_FINITE, {"0": (2,)}),
        4: SampleFault(NOT_FINITE, {"0": (), "1": ()}),
        6: SampleFault(NOT_FINITE, {"1": ()}),
    }
    few = replace(SamplesThresholds(), columns_named=1)
    x[1, 1] = nan
    assert non_finite_samples((x, y), few)[1].columns == {"0": ()}
    assert non_finite_samples((torch.arange(3), ["words"])) == {}


def test_out_of_proportion() -> None:
    """A number is far off by healthy batches where there are enough, else by the batch's other samples."""
    x, y = batch()
    x[2, 0] = 1e5
    assert far_samples((x, y)) == {}
    assert far_samples((x, y), [batch()] * 3) == {2: SampleFault(FAR, {"0": (0,)})}
    x[2, 0] = 1e15
    assert list(far_samples((x, y))) == [2]
    assert far_samples((x[:2], y[:2])) == {}
    assert far_samples((torch.zeros(8, 3), y), [(torch.zeros(8, 3), y)] * 3) == {}


def bad_with(*bad: int, runs: list[Sequence[int]] | None = None):  # type: ignore[no-untyped-def]
    def run(part: Sequence[int]) -> bool:
        if runs is not None:
            runs.append(part)
        return bool(set(part) & set(bad))

    return run


@pytest.mark.parametrize("bad", [(), (0,), (3, 200), (255,), (7, 8, 9)])
def test_search_finds_those_that_spoil(bad: tuple[int, ...]) -> None:
    """Halving finds each sample that spoils a part, in few runs."""
    runs: list[Sequence[int]] = []
    assert search(range(256), bad_with(*bad, runs=runs)) == bad
    assert len(runs) <= 2 + 17 * len(bad)


def test_search_blames_no_sample_for_what_all_have_in_common() -> None:
    """Where most parts are bad, a part cannot be run, or only a pair is bad, nobody is named."""
    assert search(range(8), bad_with(*range(8)), share=0.5) is None
    assert search(range(8), bad_with(*range(8))) == tuple(range(8))
    assert search(range(8), lambda part: None) is None
    assert search(range(8), lambda part: {2, 5} <= set(part)) == ()
    assert search(range(256), bad_with(3), thresholds=replace(SamplesThresholds(), most_runs=4)) is None
    assert search([0], bad_with(0), share=0.5) == (0,)


def test_judged_together() -> None:
    """What samples hold comes first; only the rest is searched; NaN that the model takes is left alone."""
    x, y = batch(16)
    x[1, 2], x[4] = nan, 1e15
    found = SampleSearch().judged((x, y), (), bad_with(1, 9), "log_of_negative")
    assert {index: one.cause for index, one in found.items()} == {1: NOT_FINITE, 4: FAR, 9: "log_of_negative"}
    x[3] = nan
    assert list(SampleSearch().judged((x, y), (), bad_with(1, 9), "x")) == [1, 4, 9]
    x[3] = 0.0
    assert list(SampleSearch().judged((x, y), (), None, "x")) == [1, 4]


def test_a_search_ends_where_all_samples_are_bad() -> None:
    """What all have in common is known after few single samples; bad ones that lie beside each other are all found."""
    runs: list[Sequence[int]] = []
    assert search(range(256), bad_with(*range(256), runs=runs), share=0.5) is None
    assert len(runs) <= 32
    assert search(range(64), bad_with(*range(12)), share=0.5) == tuple(range(12))
    assert search(range(64), bad_with(*range(64))) == tuple(range(64))


def test_searches_that_explain_nothing_become_rare() -> None:
    """After three in a row only the 4th, 8th, 16th is made; one that finds a sample begins anew."""
    limited, searched = SampleSearch(), []
    for time in range(1, 34):
        runs: list[Sequence[int]] = []
        assert limited.judged(batch(32), (), bad_with(*range(32), runs=runs), "x") == {}
        searched += [time] if runs else []
    assert searched == [1, 2, 3, 4, 8, 16, 32]
    for time in range(34, 65):
        found = limited.judged(batch(32), (), bad_with(5), "x")
        assert list(found) == ([5] if time == 64 else [])
    assert list(limited.judged(batch(32), (), bad_with(5), "x")) == [5]


def test_parts_that_are_good_again_do_not_count() -> None:
    """Where a batch is good when it is run again, later batches are searched all the same."""
    limited = SampleSearch()
    for _ in range(6):
        assert limited.judged(batch(), (), bad_with(), "x") == {}
    assert list(limited.judged(batch(), (), bad_with(5), "x")) == [5]

"""Advice is kept, shown and written once, and there is never too much of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_nanguard.record.advice import AdviceLog
from lightning_nanguard.record.files import read_advice
from lightning_nanguard.record.jsonl import JsonLines
from lightning_nanguard.record.messages import describe_advice
from lightning_nanguard.thresholds.records import RecordsThresholds
from lightning_nanguard.types import Advice, Finding
from tests.record.data import lines


def advice(place: str, cause: str = "dead_relu", occasion: str = "preflight") -> Advice:
    return Advice(0, 0, occasion, Finding(cause, 0.9, place=place))


def test_the_same_is_taken_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Advice on the same occasion about the same cause and place is taken once: in memory, in the log, in the file."""
    log = AdviceLog(JsonLines(tmp_path / "advice.jsonl"))
    for given in (advice("net.1"), advice("net.1"), advice("net.3"), advice("net.1", occasion="asked")):
        log.give(given)
    log.close()
    assert (
        log.given
        == read_advice(tmp_path / "advice.jsonl")
        == [advice("net.1"), advice("net.3"), advice("net.1", occasion="asked")]
    )
    assert lines(caplog) == [f"NaNGuard: {describe_advice(one)}" for one in log.given]


def test_it_is_bounded_and_silent_without_a_file(caplog: pytest.LogCaptureFixture) -> None:
    """No more is taken than was allowed; without a file, as on other ranks, nothing is shown."""
    log = AdviceLog(thresholds=RecordsThresholds(advice_per_fit=2))
    for number in range(3):
        log.give(advice(f"net.{number}"))
    log.close()
    assert [one.finding.place for one in log.given] == ["net.0", "net.1"]
    assert not caplog.records
    with pytest.raises(ValueError, match="advice_per_fit=0"):
        AdviceLog(thresholds=RecordsThresholds(advice_per_fit=0))

"""Records for the tests of sinks: examples, and a strategy that makes any."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from lightning_nanguard.record.base import RunInfo, Sink
from lightning_nanguard.record.files import read_records
from lightning_nanguard.types import Finding, Intervention

SKIP = Intervention(412, 3, 12, "non_finite_gradient", "gradient of net.0.weight", ("skip",), 0.1, 0.1)
ROLLBACK = Intervention(430, 3, 30, "exploding_loss", "loss", ("restore", "scale"), 0.1, 0.05, snapshot_step=400)

numbers = st.floats(allow_nan=True, allow_infinity=True) | st.integers(-(2**70), 2**70)
texts = st.text(st.characters(), max_size=30) | st.sampled_from(["NaN", "Infinity", "-Infinity", "\ud800", "\0", "\n"])
# Evidence says "NaN" for the number, so this one word cannot be a text there.
evidence_texts = texts.filter(lambda text: text not in ("NaN", "Infinity", "-Infinity"))
findings = st.builds(
    Finding,
    cause=texts,
    confidence=numbers,
    evidence=st.dictionaries(texts, numbers | evidence_texts, max_size=3),
    place=texts,
    samples=st.lists(st.integers(0, 10**6), max_size=3).map(tuple),
    suggestion=texts,
)
interventions = st.builds(
    Intervention,
    global_step=st.integers(0, 2**63),
    epoch=st.integers(0, 10**6),
    batch_idx=st.integers(-1, 10**9),
    fault=texts,
    place=texts,
    remedies=st.lists(texts | st.sampled_from(["skip", "restore", "scale", "stop"]), max_size=3).map(tuple),
    lr_before=st.none() | numbers,
    lr_after=st.none() | numbers,
    snapshot_step=st.none() | st.integers(0, 2**63),
    cause=st.none() | texts,
    finding=st.none() | findings,
    message=texts,
    value=st.none() | numbers,
    applied=st.booleans(),
)


class Broken(Sink):
    """Fails at whatever it is asked."""

    def open(self, run: RunInfo) -> None:
        raise OSError("no such host")

    def write(self, intervention: Intervention) -> None:
        raise RuntimeError("no connection")

    def close(self) -> None:
        raise ConnectionError("still none")


def same(one: Any, other: Any) -> bool:
    """Equality in which NaN equals NaN."""
    return repr(one) == repr(other) and type(one) is type(other)


def step(number: int, **changes: Any) -> Intervention:
    return replace(SKIP, global_step=number, **changes)


def steps(path: Path) -> list[int]:
    return [record.global_step for record in read_records(path)]


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]

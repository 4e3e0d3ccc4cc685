"""What a sink of the user's has to bring, and what it gets for nothing."""

from __future__ import annotations

import pytest

import lightning_nanguard
from lightning_nanguard.types import Intervention
from tests.record.data import SKIP


def test_write_is_all_it_needs() -> None:
    """A class with write alone is a sink of rank 0 that is called at once; one without write cannot be made."""

    class Beep(lightning_nanguard.Sink):
        def write(self, intervention: Intervention) -> None:
            pass

    sink = Beep()
    sink.open(lightning_nanguard.RunInfo())
    sink.write(SKIP)
    sink.close()
    assert (sink.every_rank, sink.timeout) == (False, None)

    class Mute(lightning_nanguard.Sink):
        pass

    with pytest.raises(TypeError, match=r"Mute.*write"):
        Mute()  # type: ignore[abstract]

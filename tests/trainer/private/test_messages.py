"""Lightning's own messages."""

from __future__ import annotations

import logging
import warnings

from lightning_nanguard.trainer.private.messages import without_messages

NAMES = ("pytorch_lightning", "lightning.pytorch", "lightning.fabric")


def test_messages_are_kept_away_inside_only() -> None:
    """Inside no hint and no warning is shown; afterwards the levels are what they were."""
    levels = [logging.getLogger(name).level for name in NAMES]
    with without_messages():
        assert all(logging.getLogger(name).level == logging.ERROR for name in NAMES)
        warnings.warn("would be an error here", UserWarning, stacklevel=1)
    assert [logging.getLogger(name).level for name in NAMES] == levels

"""Keys of a sampler stand for rows."""

from __future__ import annotations

import numpy as np
import torch

from lightning_nanguard.state.batch_origin import row_of, without


def test_rows_of_keys() -> None:
    """Integers of any kind are rows; what else a sampler draws is named in words."""
    assert [row_of(key) for key in (3, np.int64(4), torch.tensor(5), "a/b.png")] == [3, 4, 5, "a/b.png"]


def test_others_keep_their_order() -> None:
    """What is left out leaves the order of the others as it is."""
    assert without([5, 2, 9, 2, 1], {2, 7}) == [5, 9, 1]

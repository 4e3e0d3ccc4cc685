"""What the containers of a batch hold."""

from __future__ import annotations

from typing import Any

import torch

from lightning_nanguard.state.batch_contents import BatchContents


def test_what_a_step_removes_comes_back() -> None:
    """In dictionaries, lists and what they hold, in the same order; other objects in their places are noticed."""
    batch: Any = {"x": torch.ones(1), "more": [{"y": torch.zeros(1)}, torch.ones(2)]}
    contents, held = BatchContents(batch, depth=3), dict(batch)
    assert not contents.changed()
    batch["x"] = torch.ones(1)
    assert contents.changed()
    batch.pop("x")
    batch["more"][0].clear()
    batch["more"].pop()
    left = contents.now()
    contents.restore()
    assert not contents.changed()
    assert [*batch] == [*held]
    assert batch["x"] is held["x"]
    assert len(batch["more"]) == 2
    assert [*batch["more"][0]] == ["y"]
    left.restore()
    assert [*batch] == ["more"]
    assert batch["more"] == [{}]


def test_other_batches() -> None:
    """A batch that holds no dictionary and no list never changes; another batch can be remembered, too."""
    contents, part = BatchContents((torch.ones(1), "name"), depth=3), {"x": 1}
    contents.add(part, 3)
    assert not contents.changed()
    part.clear()
    contents.restore()
    assert part == {"x": 1}

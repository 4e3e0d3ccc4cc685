"""Which modules are run in a batch, and where a result goes on without its graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks

from lightning_nanguard.diagnosis.module_calls import ModuleCalls


class Model(nn.Module):
    def __init__(self, join: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.act, self.head, self.unused = nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2), nn.Linear(3, 2)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.join(self.act(self.body(x))))  # type: ignore[no-any-return]


def seen(join: Callable[[Tensor], Tensor], most: int = 100) -> ModuleCalls:
    model, x = Model(join), torch.randn(5, 4)
    calls = ModuleCalls(dict(model.named_modules()), most)
    calls.begin([x])
    model(x)
    calls.end()
    return calls


@pytest.mark.parametrize(
    ("join", "cut"),
    [
        (lambda h: h, set()),
        (lambda h: h.detach(), {"body", "act"}),
        (lambda h: h.data.flatten(1), {"body", "act"}),
        (lambda h: torch.tensor(h.tolist()), {"body", "act"}),
        (lambda h: torch.randn(5, 3, requires_grad=True), set()),
    ],
    ids=["graph", "detach", "data", "numbers", "another"],
)
def test_where_a_graph_is_cut(join: Callable[[Tensor], Tensor], cut: set[str]) -> None:
    """What is given on in the same memory or the same shape without its graph was cut, and the batch was not."""
    calls = seen(join)
    assert calls.ran() == {"", "body", "act", "head"}
    assert calls.with_graph() == {"", "body", "act", "head"}
    assert calls.cut({"head"}) == cut
    assert calls.cut({"unused"}) == set()


def test_a_parameter_of_a_module_that_is_not_called() -> None:
    """The module around it that is called stands for it."""
    assert seen(lambda h: h).seen_of("head.inner.deep") == "head"
    assert seen(lambda h: h).seen_of("unused") == ""


def test_no_hook_stays_and_calls_are_bounded() -> None:
    """After its end nothing is noted."""
    before = len(_global_forward_hooks)
    assert seen(lambda h: h, most=2).ran() == {"body", "act"}
    assert len(_global_forward_hooks) == before

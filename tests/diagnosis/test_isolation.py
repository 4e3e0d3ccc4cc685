"""Code that is run again leaves the module as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from lightning_nanguard.diagnosis.isolation import errors_logged, isolated


def test_code_runs_within_the_callers_context_and_its_backward_pass_may_give_nan() -> None:
    """What is followed is the user's own code, and NaN in its backward pass is what is looked for."""
    order: list[str] = []

    @contextmanager
    def untraced() -> Iterator[None]:
        order.append("in")
        yield
        order.append("out")

    weight = torch.zeros(1, requires_grad=True)
    with torch.autograd.set_detect_anomaly(True), isolated(untraced):
        order.append("run")
        (gradient,) = torch.autograd.grad((weight.sqrt() * 0).sum(), weight)
    assert order == ["in", "run", "out"]
    assert gradient.isnan()


def test_an_error_is_only_logged(caplog: pytest.LogCaptureFixture) -> None:
    """What could not be found out is in the log for those who look closely, and the run goes on."""
    with caplog.at_level("DEBUG", "lightning_nanguard"), errors_logged("the rows could not be read"):
        raise ValueError("no rows")
    assert caplog.messages == ["NaNGuard: the rows could not be read: ValueError('no rows')"]
    with pytest.raises(KeyboardInterrupt), errors_logged("the rows could not be read"):
        raise KeyboardInterrupt

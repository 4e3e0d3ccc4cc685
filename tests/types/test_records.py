"""What flows between the rooms keeps its values on the way to a file and back."""

from __future__ import annotations

import json
import math

import pytest

from lightning_nanguard.types import Advice, Finding, Intervention

FINDING = Finding("dead_relu", 0.9, {"share": 0.98}, "net.0", (1, 3), "lower the rate")


@pytest.mark.parametrize("value", [1.5, math.inf, -math.inf, None])
def test_an_intervention_goes_to_json_and_back(value: float | None) -> None:
    """Numbers that are not finite included; a word that looks like one stays a word."""
    told = Intervention(
        7, 1, 3, "odd", "NaN", ("skip",), 0.1, 0.05, 4, "dead_relu", FINDING, "said", value, False, (1,), 2
    )
    line = json.dumps(told.to_dict(), allow_nan=False)
    assert Intervention.from_dict({**json.loads(line), "of a later version": 1}) == told


def test_advice_goes_to_json_and_back() -> None:
    """What was noticed is read as it was written."""
    advice = Advice(5, 0, "preflight", Finding("dead_relu", 0.5, {"share": math.inf}))
    line = json.dumps(advice.to_dict(), allow_nan=False)
    assert Advice.from_dict({**json.loads(line), "of a later version": 1}) == advice


@pytest.mark.parametrize("kind", [Intervention, Advice])
def test_what_is_no_record_is_refused(kind: type[Intervention | Advice]) -> None:
    """A line that lacks what every version has says which keys it holds."""
    with pytest.raises(ValueError, match=r"not a record of .*its keys are \['a'\]"):
        kind.from_dict({"a": 1})

"""What the diagnosis may import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = "{'torch', 'numpy', 'pytorch_lightning', 'lightning', 'lightning_fabric'}"
PARTS = ", ".join(
    f"lightning_nanguard.diagnosis.{name}"
    for name in ("bundle", "diagnostician", "examination", "gradients", "module_state", "preflight")
)


@pytest.mark.parametrize(
    "code",
    [
        f"import lightning_nanguard.diagnosis.rules; heavy = {HEAVY}",
        f"from lightning_nanguard import Case, Clues, Finding, Fault, Evidence, Origin; heavy = {HEAVY}",
        f"import lightning_nanguard.diagnosis.rule_set; heavy = {HEAVY}",
        f"import {PARTS}; heavy = {{'pytorch_lightning', 'lightning', 'lightning_fabric'}}",
    ],
    ids=["rules", "case", "rule set", "diagnosis"],
)
def test_what_is_not_imported(code: str) -> None:
    """Rules and cases are numbers and words without torch; no part of the diagnosis imports Lightning."""
    check = f"import sys; {code}; found = heavy & {{*sys.modules}}; assert not found, found"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOT, timeout=120)

"""Runs that are killed: a short campaign; `make kills` has the long one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")


@pytest.mark.slow
def test_eight_kills_lose_nothing(tmp_path: Path) -> None:
    """After each of eight kills every file with a final name is whole and finite, the last good one is no older than
    it was, every record written is there, and the next run goes on.
    """
    output = tmp_path / "kills.json"
    command = [sys.executable, "-m", "benchmarks.kills", "--kills", "8", "--seed", "7", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(output.read_text())
    assert figures["wrong"] == []
    assert figures["kills"] == 8
    assert figures["runs that went on to their end"] == figures["runs"] == 4
    assert figures["files examined"] > 8


def test_the_long_campaign_lost_nothing() -> None:
    """The figures that the documents name are those of 200 kills, of which none lost anything."""
    figures = json.loads((ROOT / "benchmarks" / "results" / "kills.json").read_text())
    assert figures["kills"] == 200
    assert figures["wrong"] == []
    assert figures["runs that went on to their end"] == figures["runs"]

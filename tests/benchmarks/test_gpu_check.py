"""The script for a real card, on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_parts import PARTS, Bench


@pytest.mark.parametrize("name", PARTS)
def test_each_part_runs_and_finds_what_it_should(name: str, tmp_path: Path) -> None:
    """On the CPU, with a fake device where one is needed, every part is as it should be and keeps what it found."""
    found = gpu_check.run_part(name, Bench("cpu"), tmp_path)
    assert found["ok"], found
    assert json.loads((tmp_path / f"{name}.json").read_text()) == json.loads(json.dumps(found))
    assert found["device"].startswith("cpu-")


def test_a_run_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What has a file is not run again, an error of a part is kept, and no part begins when the time is over."""
    ran: list[str] = []

    def part(name: str, fails: bool = False) -> Any:
        def run(bench: Bench) -> dict[str, Any]:
            ran.append(name)
            if fails:
                raise RuntimeError("the card fell off the bus")
            return {"ok": True}

        return run

    parts = {"one": part("one"), "two": part("two", fails=True), "three": part("three")}
    for module in (gpu_check,):
        monkeypatch.setattr(module, "PARTS", parts)
    command = ["--device", "cpu", "--output", str(tmp_path)]
    assert gpu_check.main([*command, "--budget", "-1"]) == 0
    assert ran == []
    assert gpu_check.main([*command, "--only", "two"]) == 1
    assert gpu_check.main(command) == 1
    assert gpu_check.main(command) == 1
    assert ran == ["two", "one", "three"]
    assert json.loads((tmp_path / "two.json").read_text())["error"] == "RuntimeError: the card fell off the bus"
    assert "no time left" in capsys.readouterr().out


def test_without_a_card_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody takes figures of a CPU for those of a card."""
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu_check.main([])
    assert "there is no CUDA device" in capsys.readouterr().err

"""The answers of ``docs/faq.md`` run in the order of the page, and print what they promise."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

from tests.docs.test_docs import blocks

PAGE = (Path(__file__).parents[2] / "docs" / "faq.md").read_text(encoding="utf-8")


def test_answers(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each snippet uses what those above it define, and prints the lines behind its arrows."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "tests.docs.test_faq"}
    with warnings.catch_warnings():
        for _, code in (one for one in blocks("python") if one[0] == "faq.md"):
            exec(compile(code, "faq.md", "exec"), names)
            printed = [line for line in capsys.readouterr().out.splitlines() if line]
            assert printed == re.findall(r"# → (.*)$", code, re.MULTILINE), code


def test_every_question_has_its_source() -> None:
    """Whoever asked is linked to, by the number of the issue."""
    links = re.findall(r"\[(?:[\w -]+)?#(\d+)\]\(https://github\.com/[\w.-]+/[\w.-]+/(?:issues|pull)/(\d+)\)", PAGE)
    assert len(links) >= 10
    assert all(shown == linked for shown, linked in links)

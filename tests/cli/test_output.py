"""What the command prints has no character that controls a terminal."""

from __future__ import annotations

import io

import pytest

from lightning_nanguard.cli.output import say


def test_only_text_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """Escapes are spelled out, lines and their indentation stay."""
    say("one\x1b[2J\n  two\x07\n")
    assert capsys.readouterr().out == "one\\x1b[2J\n  two\\x07\n\n"


def test_what_the_encoding_lacks_is_spelled_out() -> None:
    """A terminal without arrows is no reason for a traceback."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    say("0.1 → 0.05", file=stream)
    stream.flush()
    assert stream.buffer.getvalue() == b"0.1 \\u2192 0.05\n"  # type: ignore[attr-defined]

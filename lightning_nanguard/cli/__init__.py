"""The ``nanguard`` command, one file a subcommand."""

from __future__ import annotations

from lightning_nanguard.cli.main import main

__all__ = ["main"]

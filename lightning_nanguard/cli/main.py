"""The ``nanguard`` command: its parser, and the table of subcommands."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from traceback import extract_tb
from typing import Protocol, final

from lightning_nanguard import __version__
from lightning_nanguard.cli import check, compare, explain, last_good, replay, report, samples, tail
from lightning_nanguard.cli.output import say


class Command(Protocol):
    """What the module of a subcommand has."""

    NAME: str
    """How it is called on the command line."""

    HELP: str
    """What it does, for ``nanguard --help``."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare its arguments."""

    def run(self, chosen: argparse.Namespace) -> int:
        """Carry it out; the exit status."""


_PACKAGE = str(Path(__file__).parents[1])

# Each imports what takes time (torch, Lightning) only when it runs.
COMMANDS: tuple[Command, ...] = (explain, report, compare, samples, tail, last_good, check, replay)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Command line without the program's name; ``None`` takes it from ``sys.argv``.

    Returns:
        Exit status: 0; 1 where ``check`` found something or ``replay`` did not reproduce the fault; 2 where the command
        could not do what it was asked for.
    """
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if chosen.command is None:
        parser.print_help()
        return 2
    # As with `python -m`, modules in the working directory can be imported.
    if "" not in sys.path:
        sys.path.insert(0, "")
    logger, once = logging.getLogger("lightning_nanguard"), _Once()
    logger.addFilter(once)
    try:
        status: int = chosen.run(chosen)
    except BrokenPipeError:  # `nanguard explain … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # a wrong argument or file, or the user's module or data, which the command has run
        say(f"nanguard: {_in_words(error)}", file=sys.stderr)
        return 2
    finally:
        logger.removeFilter(once)
    return status


@final
class _Once(logging.Filter):
    """Logs each message once, because a command may read a file several times."""

    def __init__(self) -> None:
        super().__init__()
        self._told: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in self._told
        self._told.add(message)
        return new


def _in_words(error: Exception) -> str:
    """What an exception says, with its class and its place in the user's code if it comes from there."""
    place, frames = _place(error), extract_tb(error.__traceback__)
    if isinstance(error, OSError) and error.filename is not None and error.strerror and not place:
        return f"{error.strerror}: {error.filename}"
    own = bool(frames) and frames[-1].filename.startswith(_PACKAGE) and isinstance(error, (ValueError, OSError))
    if not place and (own or isinstance(error, ImportError)):
        return str(error)  # it is written for the user
    return f"{type(error).__name__}: {error}{place}"


def _place(error: Exception) -> str:
    """The innermost line of the user's code that an exception came through, in words; empty without one."""
    packages = (*map(sysconfig.get_path, ("purelib", "platlib", "stdlib")), _PACKAGE, "<frozen ")
    own = [one for one in extract_tb(error.__traceback__) if not one.filename.startswith(packages)]
    return f" ({own[-1].filename}, line {own[-1].lineno}, in {own[-1].name})" if own else ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nanguard", description="Show what NaNGuard did in a run, or check a run before it starts."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command")
    for command in COMMANDS:
        subparser = subparsers.add_parser(command.NAME, help=command.HELP)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser

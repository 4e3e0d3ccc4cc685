"""``nanguard explain``: what the guard did in a run, in words."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_nanguard.cli.output import say
from lightning_nanguard.record.files import ADVICE_FILE, RECORDS_FILE, read_file, read_records
from lightning_nanguard.record.messages import describe_advice, tell, tell_again
from lightning_nanguard.record.receipts import receipt_of
from lightning_nanguard.record.run_log import RUN_FILE, read_run
from lightning_nanguard.record.summary import TO_DO
from lightning_nanguard.record.text import STEPS, counted
from lightning_nanguard.report.data import RunData, read_run_data
from lightning_nanguard.report.recorded import recorded_around
from lightning_nanguard.types import Advice, Kind

NAME = "explain"
HELP = "say what the guard did in a run, why, and what to do about it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "run_folder",
        metavar="run",
        type=Path,
        help=f"folder of a run, or a folder with runs below it, or one file {RECORDS_FILE}",
    )


def run(chosen: argparse.Namespace) -> int:
    """Tell each run: how it went, its records and its advice."""
    where: Path = chosen.run_folder
    if where.is_file():
        if _tell_file(where, read_run_data(where.parent)):
            return 0
        say(f"nanguard: there is no record in {where}", file=sys.stderr)
        return 2
    if not where.is_dir():
        say(f"nanguard: there is no folder {where}", file=sys.stderr)
        return 2
    folders = sorted({path.parent for name in (RUN_FILE, RECORDS_FILE, ADVICE_FILE) for path in where.rglob(name)})
    for number, folder in enumerate(sorted(folders, key=_begun)):
        data = read_run_data(folder)
        if number:
            say("")
        say(headline(data))
        _say_where_it_stands(data)
        _say_what_is_elsewhere(data, folders)
        for name in (RECORDS_FILE, ADVICE_FILE):
            if (folder / name).is_file():
                _tell_file(folder / name, data)
        for trial in data.trials:
            say(trial.told())
        if data.interventions or data.advice:
            say(STEPS)
    if not folders:
        say(
            f"nanguard: there is no run of NaNGuard in {where} or below it. guard.run_dir is the folder of a run: by "
            f"default {'nanguard'!r} beside its checkpoints, or the dirpath of NaNGuard.",
            file=sys.stderr,
        )
    return 0 if folders else 2


def _begun(folder: Path) -> tuple[str, float, str]:
    log = read_run(folder)
    return ("", 0.0, str(folder)) if log is None else (log.run_id, log.begun, str(folder))


def headline(data: RunData) -> str:
    """Which run it is, and how it went, in one line.

    Args:
        data: The run.
    """
    log = data.log
    if log is None:
        how = "with a damaged" if (data.folder / RUN_FILE).exists() else "without its"
        return f"Run {how} {RUN_FILE}, so that it is not known how it ended, in {data.folder}"
    began = f"Run {log.run_id} in {log.folder}"
    if data.earlier:
        began += f", resumed from step {log.fits[0].get('step')} of {data.earlier[-1].folder}"
    if len(log.fits) > 1:
        began += f", resumed {counted(len(log.fits) - 1, 'time')}"
    if log.ended is None:
        return f"{began}: {'it is still running' if data.alive else 'it was killed'}"
    total = len(data.interventions)
    none = "no interventions" if data.advice or data.resumed_at else "healthy, no interventions"
    done = counted(total, "intervention") if total else none
    if lost := data.unreadable:
        done = f"{counted(total + lost, 'intervention')}, of which {lost} cannot be read"
    told = f"{began}: {counted(data.updates, 'update')}, {done}"
    if not data.resumed_at:
        return told
    if data.of_last_fit is None:
        return f"{told} in the whole run"
    updates, of_fit = data.of_last_fit
    fit = f"{counted(updates, 'update')}, {counted(of_fit, 'intervention')}"
    return f"{told} in the whole run; {fit} since it was resumed"


def _say_where_it_stands(data: RunData) -> None:
    first, last = data.losses_at_ends()
    if first is not None and last is not None:
        rate = "" if data.rate_now is None else f"; the learning rate is {data.rate_now:.4g}"
        say(f"  the loss went from {first:.4g} to {last:.4g}{rate}")
    if data.mostly_skipped:
        say(f"  {data.mostly_skipped}; what to do: {TO_DO}")


def _say_what_is_elsewhere(data: RunData, told: Sequence[Path]) -> None:
    """Name the folders that the run lay in before it was resumed, unless they are told of, too."""
    known = {folder.resolve() for folder in told}
    for part in data.earlier:
        if part.folder.resolve() not in known:
            say(f"  what came before it was resumed: nanguard explain {shlex.quote(str(part.folder))}")


def _tell_file(file: Path, data: RunData) -> int:
    """Tell the records or the advice in a file; gives their number."""
    if file.name == ADVICE_FILE:
        advice = read_file(file, Advice.from_dict)
        for piece in advice:
            say(describe_advice(piece))
        return len(advice)
    seen: set[Kind] = set()
    before = None
    records = read_records(file)
    for record in records:
        if data.resumed_at and before is not None and record.global_step < before:
            say("-- the run was resumed from an earlier step --")
        before = record.global_step
        if record.kind in seen:
            say(tell_again(record))
        else:
            seen.add(record.kind)
            say(tell(record))
            for line in recorded_around(record, data):
                say(f"  {line}")
        receipt = receipt_of(record, data.receipts)
        if receipt is not None:
            say(f"  result: {receipt.in_words()}")
    return len(records)

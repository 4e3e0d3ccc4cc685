"""``nanguard explain``: what the guard did in a run, in words."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from lightning_nanguard.cli.output import say
from lightning_nanguard.record.files import ADVICE_FILE, RECORDS_FILE, read_file, read_records
from lightning_nanguard.record.messages import Thinning, describe_advice, tell_again
from lightning_nanguard.record.receipts import receipt_of
from lightning_nanguard.record.run_log import RUN_FILE, read_run
from lightning_nanguard.record.summary import TO_DO
from lightning_nanguard.record.text import STEPS, counted
from lightning_nanguard.report.data import RunData, read_run_data, recorded_around
from lightning_nanguard.types import Advice, Intervention

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
    parser.add_argument(
        "--all", action="store_true", help="tell every intervention, not only the 1st, 2nd, 4th, 8th … of each kind"
    )


def run(chosen: argparse.Namespace) -> int:
    """Tell each run: how it went, its records and its advice."""
    where: Path = chosen.run_folder
    if where.is_file():
        if _tell([where], read_run_data(where.parent), everything=chosen.all):
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
        files = [folder / name for name in (RECORDS_FILE, ADVICE_FILE)]
        _tell([file for file in files if file.is_file()], data, everything=chosen.all)
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
    """Which run it is, and how it went, in one line."""
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
        # The first one may be in an earlier folder of the run.
        read = "read why the first of them was skipped" if data.earlier else f"see step {data.first_skipped} below"
        say(f"  {data.mostly_skipped}; what to do: {TO_DO.format(read=read)}")


def _say_what_is_elsewhere(data: RunData, told: Sequence[Path]) -> None:
    """Name the folders that the run lay in before it was resumed, unless they are told of, too."""
    known = {folder.resolve() for folder in told}
    for part in data.earlier:
        if part.folder.resolve() not in known:
            say(f"  what came before it was resumed: nanguard explain {shlex.quote(str(part.folder))}")


def _tell(files: Sequence[Path], data: RunData, *, everything: bool) -> int:
    """Tell the records and the advice in files of a run, in the order of their steps; gives their number."""
    advice: list[Advice] = []
    records: list[Intervention] = []
    for file in files:
        if file.name == ADVICE_FILE:
            advice += read_file(file, Advice.from_dict)
        else:
            records += read_records(file)
    told: list[Intervention | Advice] = [*records, *advice]
    if not data.resumed_at or (_in_order(records) and _in_order(advice)):
        told.sort(key=lambda one: one.global_step)
    thinning, before, hidden = Thinning(everything=everything), None, 0
    for one in told:
        if isinstance(one, Advice):
            say(describe_advice(one))
            continue
        if data.resumed_at and before is not None and one.global_step < before:
            say("-- the run was resumed from an earlier step --")
        before = one.global_step
        hidden += not _tell_record(one, data, thinning.shown(one))
    if hidden:
        say(f"-- {counted(hidden, 'intervention')} not shown: nanguard explain --all --")
    return len(told)


def _in_order(records: Sequence[Intervention | Advice]) -> bool:
    return all(one.global_step <= other.global_step for one, other in pairwise(records))


def _tell_record(record: Intervention, data: RunData, text: str) -> bool:
    """Tell one intervention with its result; gives whether it was told. One with a result is always told."""
    receipt = receipt_of(record, data.receipts)
    if not text and receipt is None:
        return False
    say(text or tell_again(record))
    if "\n" in text:  # in full
        for line in recorded_around(record, data):
            say(f"  {line}")
    if receipt is not None:
        say(f"  result: {receipt.in_words()}")
    return True

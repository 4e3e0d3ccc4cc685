"""The ``nanguard`` command: what a guard did, where a run can go on from, how it starts, what went wrong."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_nanguard.diagnosis.clues import Layer
from lightning_nanguard.record.files import read_advice, read_records
from lightning_nanguard.record.messages import describe, describe_advice, describe_finding
from lightning_nanguard.types import Finding

_RECORDS, _ADVICE = "interventions.jsonl", "advice.jsonl"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Command line without the program's name; ``None`` takes it from ``sys.argv``.

    Returns:
        Exit status: 0; 1 where ``check`` found something or ``replay`` did not reproduce the fault; 2 where the command
        could not do what it was asked for.
    """
    chosen = _parser().parse_args(arguments)
    # As with `python -m`: what lies in the folder of now can be imported.
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        status: int = chosen.run_command(chosen)
    except (ImportError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        print(f"nanguard: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nanguard", description="What a guard did to a run, and what is wrong with one before it starts."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    explain = commands.add_parser("explain", help="print every record of a run with its finding, in words")
    explain.add_argument("run", type=Path, help=f"folder of the run (searched for {_RECORDS}), or the file itself")
    explain.set_defaults(run_command=_explain)
    last = commands.add_parser("last-good", help="print the newest good checkpoint that the guard kept, for ckpt_path")
    last.add_argument("run", type=Path, help="folder of the run, or of many: it is searched with all below it")
    last.set_defaults(run_command=lambda chosen: _last_good(chosen.run))
    check = commands.add_parser(
        "check", help="look at the data and the untrained model of a LightningCLI configuration"
    )
    check.add_argument("--config", type=Path, required=True, help="the YAML file")
    check.add_argument("--model", help="class of the module, package.file:Class or file.py:Class, if the file has none")
    check.add_argument("--data", help="class of the data module, if the file has none")
    check.add_argument("--gradients", action="store_true", help="compare the gradient with finite differences")
    check.add_argument("--overfit", action="store_true", help="try whether a few samples can be learned by heart")
    check.set_defaults(run_command=_check)
    replay = commands.add_parser("replay", help="run the batch of an incident again and say what happened")
    replay.add_argument("bundle", type=Path, help="folder of the incident")
    replay.add_argument("--module", help="class of the module, or a function that makes it: package.file:Class")
    replay.add_argument("--args", type=json.loads, metavar="JSON", help="its arguments; else those it saved itself")
    replay.set_defaults(run_command=_replay)
    return parser


def _explain(chosen: argparse.Namespace) -> int:
    names = (_RECORDS, _ADVICE)
    files = [chosen.run] if chosen.run.is_file() else sorted(p for name in names for p in chosen.run.rglob(name))
    if not files:
        print(
            f"nanguard: no {_RECORDS} in {chosen.run}: either the guard had nothing to do there, or its records lie "
            "elsewhere (NaNGuard's dirpath).",
            file=sys.stderr,
        )
        return 2
    for file in files:
        if len(files) > 1:
            print(f"{file}:")
        lines = map(describe_advice, read_advice(file)) if file.name == _ADVICE else map(describe, read_records(file))
        for line in lines:
            print(line)
    return 0


def _last_good(run: Path) -> int:
    from lightning_nanguard.checkpoints.inspection import (  # torch takes a second to import
        LAST_GOOD,
        inspect,
        newest_good,
    )

    kept = sorted(run.rglob(LAST_GOOD), key=lambda file: file.stat().st_mtime_ns, reverse=True)
    for file in kept:
        found = inspect(file)
        if found.good():
            print(file)
            print(f"step {found.global_step}, {file.stat().st_size:,} bytes; whole and finite", file=sys.stderr)
            return 0
        print(f"nanguard: {file} is bad: {found.damage or ', '.join(found.tensors)}", file=sys.stderr)
    if not kept:
        print(
            f"nanguard: no {LAST_GOOD} in {run}: NaNGuard(last_good_every_n_steps=…) writes one, once its state is "
            "certified.",
            file=sys.stderr,
        )
    other = newest_good([run, *(folder for folder in run.rglob("*") if folder.is_dir())])
    if other is not None:
        print(
            f"nanguard: the newest good checkpoint there is {other.path} of step {other.global_step}", file=sys.stderr
        )
    return 2


def _check(chosen: argparse.Namespace) -> int:
    from lightning_nanguard.cli.check import check
    from lightning_nanguard.trainer.private.messages import without_messages

    # Where the file is wins over where the command is run: its classes mostly lie beside it.
    model, data = (None if name is None else _load(name) for name in (chosen.model, chosen.data))
    with without_messages():
        report = check(chosen.config, model, data, gradients=chosen.gradients, overfit=chosen.overfit)
    for finding in report.findings:
        print(_told(finding))
    for note in report.notes:
        print(note)
    sure = [finding for finding in report.findings if finding.confidence > 0.5]
    if not sure:
        print("nanguard: nothing found that is wrong")
    return 1 if sure else 0


def _told(finding: Finding) -> str:
    return f"{describe_finding(finding)} (confidence {finding.confidence:.2g})"


def _replay(chosen: argparse.Namespace) -> int:
    from lightning_nanguard.cli.check import replay_bundle
    from lightning_nanguard.diagnosis.bundle import describe as describe_bundle
    from lightning_nanguard.diagnosis.bundle import read, versions
    from lightning_nanguard.trainer.private.messages import without_messages

    bundle = read(chosen.bundle)
    print(describe_bundle(bundle))
    other = {name: was for name, was in bundle.versions.items() if versions().get(name) != was}
    if other:
        print(f"versions then: {', '.join(f'{name} {was}' for name, was in other.items())}")
    build = _load(chosen.module or bundle.module)
    with without_messages():
        replayed = replay_bundle(bundle, build(**(bundle.hparams if chosen.args is None else chosen.args)))
    losses = ", ".join(f"{loss:.6g}" for loss in replayed.losses) or "none"
    gradient = (
        "" if replayed.gradient_finite is None else f", gradient {'' if replayed.gradient_finite else 'not '}finite"
    )
    print(f"replayed: loss {losses}{gradient}")
    print("no cause found now" if replayed.finding is None else f"cause: {_told(replayed.finding)}")
    for line in _table(replayed.layers):
        print(line)
    same = replayed.finding is not None and (bundle.finding is None or bundle.finding.cause == replayed.finding.cause)
    return 0 if replayed.bad or same else 1


def _table(layers: Sequence[Layer]) -> list[str]:
    """One line for each layer: root mean squares in and out, the range it gave, norms of weight and gradient."""

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3g}"

    rows = [["layer", "kind", "in", "out", "from", "to", "weight", "gradient", "saturated", "dead"]] if layers else []
    for one in layers:
        numbers = (one.inputs, one.outputs, one.lowest, one.highest, one.weight, one.gradient, one.saturated, one.dead)
        rows.append([one.path, one.kind, *map(number, numbers)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _load(name: str) -> Any:
    """The object that ``package.file:Name`` or ``folder/file.py:Name`` stands for."""
    home, separator, attribute = name.rpartition(":")
    if not separator:
        raise ValueError(f"{name!r} names no class: write package.file:Class, or folder/file.py:Class.")
    if home.endswith(".py"):
        path = Path(home)
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {home}.")
        sys.path.insert(0, str(path.parent.resolve()))
        home = path.stem
    found: Any = importlib.import_module(home)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


if __name__ == "__main__":
    sys.exit(main())

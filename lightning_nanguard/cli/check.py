"""``nanguard check``: the data and the untrained model before a run, or the data alone."""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning_nanguard.cli.importing import load
from lightning_nanguard.cli.output import say
from lightning_nanguard.record.bad_samples import describe_fault
from lightning_nanguard.record.messages import describe_finding
from lightning_nanguard.record.text import counted

NAME = "check"
HELP = "check the data and the untrained model of a LightningCLI configuration, or with --data alone every sample"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--config", type=Path, help="the YAML file of the run; without it, every sample of --data is read"
    )
    parser.add_argument(
        "--model", help="class of the module, if the YAML file names none: package.file:Class or file.py:Class"
    )
    parser.add_argument(
        "--data",
        help="class of the data module, if the YAML file names none; without --config a data module, loader or data "
        "set, or a class or function that makes one: package.file:Name",
    )
    parser.add_argument(
        "--args",
        type=json.loads,
        metavar="JSON",
        help="arguments for the class or function that --data names, as a JSON object",
    )
    parser.add_argument(
        "--factor",
        type=float,
        help="report a sample if its largest number is this many times the usual one (default: 1000)",
    )
    parser.add_argument(
        "--gradients", action="store_true", help="compare the gradient of each parameter with finite differences"
    )
    parser.add_argument(
        "--overfit", action="store_true", help="check whether the model can learn eight samples by heart"
    )


def run(chosen: argparse.Namespace) -> int:
    """Print what is found; 1 where a finding is more likely than not."""
    if chosen.config is None:
        if chosen.data is None:
            raise ValueError("give --config to check a run, or --data alone to check the data without a model.")
        return _check_data(chosen)
    from lightning_nanguard.trainer.offline.check import check_config
    from lightning_nanguard.trainer.offline.config_parts import wrong_parts
    from lightning_nanguard.trainer.private.first_batch import without_messages

    model, data = (None if name is None else load(name) for name in (chosen.model, chosen.data))
    wrong = wrong_parts(chosen.config)
    for line in wrong:
        say(f"nanguard: {line}", file=sys.stderr)
    if wrong:
        return 2
    with without_messages():
        report = check_config(chosen.config, model, data, gradients=chosen.gradients, overfit=chosen.overfit)
    for finding in report.findings:
        say(describe_finding(finding, confidence=True))
    for note in report.notes:
        say(note)
    if not report.sure:
        print("nanguard: found nothing wrong")
    return 1 if report.sure else 0


def _check_data(chosen: argparse.Namespace) -> int:
    """Read all samples once; 1 where one is unlike the others."""
    from lightning_nanguard.diagnosis.data_check import DataCheck
    from lightning_nanguard.trainer.data_walk import DataWalk, sources

    if chosen.factor is not None and not chosen.factor > 1:
        raise ValueError(f"--factor {chosen.factor}: expected a number above 1.")
    made: Any = load(chosen.data)
    if isinstance(made, type) or (callable(made) and not hasattr(made, "__iter__")):
        made = made(**(chosen.args or {}))
    bad = 0
    for name, source in sources(made).items():
        check, walk = DataCheck(chosen.factor), DataWalk(source)
        # A bar for a person only: none where the output goes to a file.
        bar = import_module("tqdm").tqdm(walk, name, len(walk) or None, file=sys.stderr, disable=None, unit=" samples")
        for place, sample in bar:
            check.see(place, sample)
        found = check.found()
        bad += len(found)
        for one in found:
            say(f"{name}, {describe_fault(one)}")
        if check.shapes_vary():
            say(f"{name}: the shapes of the samples differ, so they were not compared")
        say(f"{name}: {counted(check.count, 'sample')} read, {counted(len(found), 'finding')}")
    return 1 if bad else 0

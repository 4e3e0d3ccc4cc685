"""``nanguard check``: the data and the untrained model, before a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_nanguard.cli.importing import load
from lightning_nanguard.cli.output import say
from lightning_nanguard.record.messages import describe_finding

NAME = "check"
HELP = "look at the data and the untrained model of a LightningCLI configuration"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--config", type=Path, required=True, help="the YAML file")
    parser.add_argument(
        "--model", help="class of the module, package.file:Class or file.py:Class, if the file has none"
    )
    parser.add_argument("--data", help="class of the data module, if the file has none")
    parser.add_argument("--gradients", action="store_true", help="compare the gradient with finite differences")
    parser.add_argument("--overfit", action="store_true", help="try whether a few samples can be learned by heart")


def run(chosen: argparse.Namespace) -> int:
    """Print what is found; 1 where a finding is more likely than not."""
    from lightning_nanguard.trainer.offline_check import check_config
    from lightning_nanguard.trainer.private.messages import without_messages

    model, data = (None if name is None else load(name) for name in (chosen.model, chosen.data))
    with without_messages():
        report = check_config(chosen.config, model, data, gradients=chosen.gradients, overfit=chosen.overfit)
    for finding in report.findings:
        say(describe_finding(finding, confidence=True))
    for note in report.notes:
        say(note)
    if not report.sure:
        print("nanguard: nothing found that is wrong")
    return 1 if report.sure else 0

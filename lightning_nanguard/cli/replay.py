"""``nanguard replay``: the batch of an incident, run again.

An incident may come from somebody else: only code that the command line names is run.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_nanguard.cli.importing import load
from lightning_nanguard.cli.output import say, say_table
from lightning_nanguard.record.messages import describe_finding

if TYPE_CHECKING:
    from lightning_nanguard.diagnosis.case import Layer
    from lightning_nanguard.trainer.offline.replay import ReplayReport

NAME = "replay"
HELP = "run the batch of an incident again and say what happened"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bundle", type=Path, help="folder of the incident")
    parser.add_argument(
        "--module", help="class of the module, or a function that makes it: package.file:Class or file.py:Class"
    )
    parser.add_argument(
        "--args",
        type=json.loads,
        metavar="JSON",
        help="its arguments, as a JSON object; by default those of save_hyperparameters",
    )


def run(chosen: argparse.Namespace) -> int:
    """Print the incident, then what came of its replay; 1 where neither a bad number nor its cause came back."""
    from lightning_nanguard.diagnosis.bundle import describe, read, to_import, versions
    from lightning_nanguard.trainer.offline.replay import replay_bundle
    from lightning_nanguard.trainer.private.first_batch import without_messages
    from lightning_nanguard.trainer.private.packages import is_module_class

    incident = read(chosen.bundle, with_batch=False)
    say(describe(incident))
    other = {name: was for name, was in incident.versions.items() if versions().get(name) != was}
    if other:
        say(f"versions in the run: {', '.join(f'{name} {was}' for name, was in other.items())}")
    if chosen.module is None:
        raise ValueError(
            "name the class of the module, or a function that makes it. For safety, an incident never chooses the code "
            f"that runs. If you trust the module of the run, add --module {shlex.quote(to_import(incident.module))}"
        )
    build = load(chosen.module)
    with without_messages():
        # What the incident holds is given to the class of a module alone.
        saved = incident.hparams if is_module_class(build) else {}
        module = build(**(saved if chosen.args is None else chosen.args))
        if not is_module_class(type(module)):
            raise ValueError(f"{chosen.module} made a {type(module).__name__}, which is not a LightningModule.")
        bundle = read(chosen.bundle)
        replayed = replay_bundle(bundle, module)
    _show(replayed)
    found = replayed.finding
    same = found is not None and (bundle.finding is None or bundle.finding.cause == found.cause)
    return 0 if replayed.bad or same else 1


def _show(replayed: ReplayReport) -> None:
    losses = ", ".join(f"{loss:.6g}" for loss in replayed.losses) or "none"
    finite = replayed.gradient_finite
    gradient = "" if finite is None else f", gradient {'' if finite else 'not '}finite"
    say(f"replayed: loss {losses}{gradient}")
    found = replayed.finding
    say("no cause found in the replay" if found is None else f"cause: {describe_finding(found, confidence=True)}")
    say_table(layer_table(replayed.layers))


def layer_table(layers: Sequence[Layer]) -> list[list[str]]:
    """One row for each layer: root mean squares in and out, the range it gave, norms of weight and gradient."""

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3g}"

    rows = [["layer", "kind", "in", "out", "from", "to", "weight", "gradient", "saturated", "dead"]] if layers else []
    for one in layers:
        numbers = (one.inputs, one.outputs, one.lowest, one.highest, one.weight, one.gradient, one.saturated, one.dead)
        rows.append([one.path, one.kind, *map(number, numbers)])
    return rows

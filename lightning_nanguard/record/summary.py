"""The one line at the end of a fit."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence

from lightning_nanguard.record.text import counted, in_words, printable
from lightning_nanguard.types import ActOn

_ACTIONS = {
    "skip": ("batch skipped", "batches skipped"),
    "restore": ("rollback", "rollbacks"),
    "restore part": ("part of the state put back", "parts of the state put back"),
    "scale": ("change of the learning rate", "changes of the learning rate"),
    "clip": ("change of gradient clipping", "changes of gradient clipping"),
    "reset moments": ("reset of the optimizer's state", "resets of the optimizer's state"),
    "undo": ("batch undone", "batches undone"),
    "resume": ("other checkpoint gone on from", "other checkpoints gone on from"),
    "rewrite": ("checkpoint written with the last good state", "checkpoints written with the last good state"),
    "hold rate": ("learning rate replaced by the last valid one", "learning rates replaced by the last valid ones"),
    "give back": ("part of a cut taken back", "parts of a cut taken back"),
    "end clipping": ("end of gradient clipping", "ends of gradient clipping"),
    "redo": ("step made again", "steps made again"),
    "leave out": ("micro-batch left out", "micro-batches left out"),
    "keep good samples": ("update made from the good samples", "updates made from the good samples"),
    "stop": ("stop", "stops"),
}


def summary(
    updates: int,
    faults: Mapping[str, int] | None = None,
    remedies: Mapping[str, int] | None = None,
    *,
    lr_multiplier: float = 1.0,
    path: str | os.PathLike[str] | None = None,
    observe: bool = False,
    act_on: ActOn = "certain",
    advice: Sequence[str] = (),
) -> str:
    """Say in one line what happened in a fit.

    Args:
        updates: Number of updates watched.
        faults: How often each fault was found, such as :attr:`Memory.faults`.
        remedies: How often each remedy was used, such as :attr:`Memory.remedies`.
        lr_multiplier: Factor on the learning rate at the end.
        path: The folder of the run.
        observe: Whether the guard only observed.
        act_on: When the guard changes the run.
        advice: Causes that advice was given about.

    Example:
        >>> summary(1200)
        'NaNGuard: 1,200 updates watched (act_on="certain"), nothing to do'
        >>> summary(1200, {"non_finite_loss": 1}, {"skip": 1}, path="runs/7")[-77:]
        '(non-finite loss 1): 1 batch skipped; read more with: nanguard explain runs/7'
    """
    rate = f"; the learning rate ends at {lr_multiplier:.4g} times its schedule" if lr_multiplier != 1.0 else ""
    watched = f'NaNGuard: {counted(updates, "update")} watched (act_on="{act_on}")'
    total = sum((faults or {}).values())
    advised = f"; advice: {', '.join(sorted(map(in_words, set(advice))))}" if advice else ""
    where = f"; read more with: nanguard explain {shlex.quote(os.fspath(path))}" if path is not None else ""
    if not total:
        done = "no interventions" if advice else "nothing to do"
        return printable(f"{watched}, {done}{rate}{advised}{where if advice else ''}")
    # Sorted, since the order in which faults came must not change the line.
    met = ", ".join(f"{in_words(kind)} {count:,}" for kind, count in sorted((faults or {}).items(), key=_most_first))
    used = sorted((remedies or {}).items(), key=_most_first)
    done = ", ".join(counted(count, *_ACTIONS.get(word, (f"× {word}", f"× {word}"))) for word, count in used)
    acted = f"{'; not done: ' if observe else ': '}{done}" if done else ""
    noun = "fault found, only observed" if observe else "intervention"
    nouns = "faults found, only observed" if observe else "interventions"
    return printable(f"{watched}, {counted(total, noun, nouns)} ({met}){acted}{rate}{advised}{where}")


def _most_first(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]

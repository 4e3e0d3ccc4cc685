"""The one line at the end of a fit, and the message of the error that ends a run."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence

from lightning_nanguard.record.text import counted, in_words, printable
from lightning_nanguard.thresholds.fixed import NUMBERS_PER_MESSAGE
from lightning_nanguard.thresholds.report import REPORT
from lightning_nanguard.types import ActOn, Fault, Finding

TO_DO = (
    "{read}. If the data are bad, clean them. If an operation makes NaN of good data, correct it. If good batches with "
    "finite numbers were skipped, give their detector a larger limit, as in GradientSpike(ratio=…)"
)
"""What to do if most updates were skipped; ``read`` says where it is written why they were."""

_READ = "read why the first of them was skipped (nanguard explain)"

_ACTIONS = {
    "stop": ("stop", "stops"),
    "restore": ("rollback", "rollbacks"),
    "scale": ("change of the learning rate", "changes of the learning rate"),
    "clip": ("change of gradient clipping", "changes of gradient clipping"),
    "reset moments": ("reset of the optimizer's state", "resets of the optimizer's state"),
    "give back": ("rise of the learning rate after a cut", "rises of the learning rate after a cut"),
    "end clipping": ("end of gradient clipping", "ends of gradient clipping"),
    "skip": ("batch skipped", "batches skipped"),
    "keep good samples": ("update made from the good samples", "updates made from the good samples"),
    "leave out": ("micro-batch left out", "micro-batches left out"),
    "undo": ("batch undone", "batches undone"),
    "redo": ("fault removed by making steps again", "faults removed by making steps again"),
    "restore averages": ("restored average", "restored averages"),
    "restore scale": ("restored loss scale", "restored loss scales"),
    "resume": ("resume from another checkpoint", "resumes from another checkpoint"),
    "rewrite": ("checkpoint written with the last good state", "checkpoints written with the last good state"),
    "hold rate": ("learning rate replaced by the last valid one", "learning rates replaced by the last valid ones"),
    "hold value": (
        "value of a parameter group replaced by the last valid one",
        "values of parameter groups replaced by valid ones",
    ),
}
"""What was done, in the order in which the summary has it: what matters most for the run first."""


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
    trials: str = "",
    whole: tuple[int, int] | None = None,
) -> str:
    """Say in one line what happened in a fit.

    Args:
        updates: Number of updates watched in the fit.
        faults: How often each fault was found in it.
        remedies: How often each remedy was used in it.
        lr_multiplier: Factor on the learning rate at the end.
        path: The folder of the run.
        observe: Whether the guard only observed.
        act_on: When the guard changes the run.
        advice: Causes that advice was given about.
        trials: The trials in words.
        whole: Updates and interventions of the whole run, if it was resumed.

    Example:
        >>> summary(1200)
        'NaNGuard: 1,200 updates watched (act_on="certain"), no interventions'
        >>> summary(200, whole=(1400, 3))[-98:]
        'in this fit (act_on="certain"), no interventions; in the whole run: 1,400 updates, 3 interventions'
        >>> summary(1200, {"non_finite_loss": 1}, {"skip": 1}, path="runs/7")[-77:]
        '(non-finite loss 1): 1 batch skipped; read more with: nanguard explain runs/7'
    """
    rate = f"; the learning rate ends at {lr_multiplier:.4g} times its schedule" if lr_multiplier != 1.0 else ""
    here = " in this fit" if whole is not None else ""
    hardly = "" if observe else mostly_skipped((remedies or {}).get("skip", 0), updates)
    watched = (
        f'NaNGuard: {hardly + ". " if hardly else ""}{counted(updates, "update")} watched{here} (act_on="{act_on}")'
    )
    if observe and "stop" in (remedies or {}):
        remedies = {**(remedies or {}), "stop": 1}  # the first one would have ended the run
    total = sum((faults or {}).values())
    advised = f"; advice: {', '.join(sorted(map(in_words, set(advice))))}" if advice else ""
    to_do = f"; what to do: {TO_DO.format(read=_READ)}" if hardly else ""
    all_in_all = f"{f'; {trials}' if trials else ''}{_whole(whole)}{to_do}"
    where = f"; read more with: nanguard explain {shlex.quote(os.fspath(path))}" if path is not None else ""
    if not total:
        told = advice or trials or (whole is not None and whole[1] > 0)
        return printable(f"{watched}, no interventions{rate}{advised}{all_in_all}{where if told else ''}")
    # Sorted, so that the line does not depend on the order of the faults.
    met = ", ".join(f"{in_words(kind)} {count:,}" for kind, count in sorted((faults or {}).items(), key=_most_first))
    done = ", ".join(
        counted(count, *_ACTIONS.get(word, (f"× {word}", f"× {word}")))
        for word, count in sorted((remedies or {}).items(), key=_most_important_first)
    )
    acted = f"{'; not done: ' if observe else ': '}{done}" if done else ""
    noun = "fault found, only observed" if observe else "intervention"
    nouns = "faults found, only observed" if observe else "interventions"
    return printable(f"{watched}, {counted(total, noun, nouns)} ({met}){acted}{rate}{advised}{all_in_all}{where}")


def mostly_skipped(skipped: int, updates: int) -> str:
    """Say how many updates were skipped, if most of them were; else ``""``.

    Example:
        >>> mostly_skipped(191, 192)
        '191 of 192 updates were skipped: almost nothing was learned'
        >>> mostly_skipped(3, 192)
        ''
    """
    if updates < REPORT.least_updates_of_share or skipped < REPORT.share_skipped_most * updates:
        return ""
    nearly_all = skipped >= REPORT.share_skipped_nearly_all * updates
    learned = "almost nothing was learned" if nearly_all else "the run learned from less than half of its batches"
    return f"{min(skipped, updates):,} of {counted(updates, 'update')} were skipped: {learned}"


def _whole(whole: tuple[int, int] | None) -> str:
    if whole is None:
        return ""
    return f"; in the whole run: {counted(whole[0], 'update')}, {counted(whole[1], 'intervention')}"


def _most_important_first(item: tuple[str, int]) -> tuple[int, int, str]:
    word, count = item
    return list(_ACTIONS).index(word) if word in _ACTIONS else len(_ACTIONS), -count, word


def _most_first(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]


def stop_message(
    reason: str,
    fault: Fault,
    clock: tuple[int, int, int],
    finding: Finding | None = None,
    tried: Sequence[str] = (),
    snapshot_step: int | None = None,
    *,
    limit: str = "",
    on_disk: str = "",
) -> str:
    """Say in a few lines why a run ends, what was tried, which weights the module holds, and what to do next.

    Args:
        reason: Why the run cannot go on.
        fault: The last fault.
        clock: Its ``global_step``, epoch and batch.
        finding: Its cause; ``None`` if none was found.
        tried: What the guard had done before, the newest last.
        snapshot_step: ``global_step`` of the weights in the module; ``None`` if there was no good state.
        limit: The argument of :class:`~lightning_nanguard.Budget` that ended the run; empty if none did.
        on_disk: Which files have more, in lines.

    Example:
        >>> fault = Fault("non_finite_loss", "batch", "loss", message="the loss is nan")
        >>> print(stop_message("no update was ever good", fault, (64, 1, 31), tried=["non_finite_loss: skip"] * 3))
        Training cannot go on: no update was ever good.
          where: step 64 (epoch 1, batch 31): the loss is nan (non_finite_loss, loss)
          why: no cause was found. Try a lower learning rate, and look at the batch.
          tried before: non_finite_loss: skip (3 times)
          weights: there is no good state to go back to
    """
    global_step, epoch, batch_idx = clock
    lines = [
        f"Training cannot go on: {reason}.",
        f"where: step {global_step} (epoch {epoch}, batch {batch_idx}): {fault.message} ({fault.kind}, {fault.place})",
        f"why: {_why(finding)}",
        f"tried before: {_tried(tried)}",
        "weights: "
        + (
            "there is no good state to go back to"
            if snapshot_step is None
            else f"the module holds the weights of step {snapshot_step}"
        ),
    ]
    if limit:
        lines.append(f"limit: if the run should have gone on, raise Budget({limit}=…)")
    return "\n  ".join(map(printable, [*lines, *on_disk.splitlines()]))


def _why(finding: Finding | None) -> str:
    if finding is None:
        return "no cause was found. Try a lower learning rate, and look at the batch."
    place = f" in {finding.place}" if finding.place else ""
    return f"{finding.cause}{place}: {finding.suggestion}"


def _tried(tried: Sequence[str]) -> str:
    """What was done, equal actions in a row counted."""
    runs: list[tuple[str, int]] = []
    for words in tried:
        again = bool(runs) and runs[-1][0] == words
        runs[-1:] = [(words, runs[-1][1] + 1)] if again else [*runs[-1:], (words, 1)]
    told = [f"{words} ({times} times)" if times > 1 else words for words, times in runs]
    newest = f"(the newest {len(tried)}) " if len(tried) >= NUMBERS_PER_MESSAGE else ""
    return f"{newest}{'; '.join(told)}" if told else "nothing"

"""The message of the error that ends a run."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_nanguard.record.text import printable
from lightning_nanguard.thresholds.fixed import NUMBERS_PER_MESSAGE
from lightning_nanguard.types import Fault, Finding


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

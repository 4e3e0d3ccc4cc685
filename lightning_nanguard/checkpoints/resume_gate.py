"""Refuses to resume from a bad checkpoint, or resumes from the newest good one instead."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, final

from torch import nn

from lightning_nanguard.checkpoints.inspection import (
    Inspection,
    checkpoint_files,
    damage,
    folders_of_run,
    newest_good,
    run_of,
    run_of_file,
)
from lightning_nanguard.checkpoints.poison import KnownWeights, poisoned
from lightning_nanguard.errors import BadCheckpointError
from lightning_nanguard.record.run_log import RUN_FILE, read_run, with_earlier_parts
from lightning_nanguard.state.finite import allowances, own_buffers
from lightning_nanguard.state.learner import Learner
from lightning_nanguard.thresholds.checkpoints import CheckpointsThresholds

_logger = logging.getLogger("lightning_nanguard")


@final
class ResumeGate:
    """Refuses to resume a run from a checkpoint that is poisoned (holds NaN or Inf) or torn (damaged).

    Args:
        module: The module as it was built. If its buffers have non-finite elements, such as in a mask, those of a
            checkpoint may have them too.
        folders: Folders, besides that of the checkpoint, in which good checkpoints may be.
        take: Whether to resume from the newest good checkpoint of the same run, instead of raising an error that names
            it.
        observe: Whether to warn only.
        thresholds: How many tensors the error names.

    Attributes:
        refused: Which checkpoint was bad and why, in words; ``None`` if it was good, or no other one was taken.
        taken: The checkpoint that was taken in its place; ``None`` if none was.
    """

    def __init__(
        self,
        module: nn.Module,
        folders: Iterable[Path],
        *,
        take: bool,
        observe: bool,
        thresholds: CheckpointsThresholds = CheckpointsThresholds(),
    ) -> None:
        self._module = module
        self._folders = tuple(folders)
        self._take = take
        self._observe = observe
        self._named = thresholds.tensors_named
        self.refused: str | None = None
        self.taken: Inspection | None = None

    def __call__(self, path: Path, content: Mapping[str, Any] | None, error: Exception | None) -> Path | None:
        """The file to resume from in place of ``path``; ``None`` for ``path`` itself.

        Args:
            path: The checkpoint asked for.
            content: The loaded checkpoint; ``None`` if loading failed.
            error: The error of loading.

        Raises:
            BadCheckpointError: If it is poisoned or torn, and no other checkpoint is to be taken.
        """
        weights = [*Learner(self._module, []).weights()]
        tensors = {name: tensor for (_, name), tensor in weights}
        known = KnownWeights(tensors, allowances(weights), own_buffers(self._module))
        missing = content is None and not path.exists()
        wrong = "there is no such file" if missing else damage(path)
        bad = poisoned(content, known) if content is not None else []
        if not wrong and not bad:
            return None  # it is good, or the error has another cause and must reach the user
        reason = wrong or f"{_listed(bad, self._named)} {'is' if len(bad) == 1 else 'are'} not finite"
        if self._observe:
            _logger.warning("NaNGuard: %s is bad: %s. With observe=True the guard only warns.", path, reason)
            return None
        if missing and not self._take:
            return None  # Lightning raises its own error
        nearby = _nearby(path, self._folders)
        run = _run_of(path, content, nearby)
        # `nanguard last-good` uses the same folders, so both find the same file.
        logs = [log for folder in nearby if (log := read_run(folder)) is not None and log.run_id == run]
        nearby += [folder for log in logs for folder in folders_of_run(log)]
        newest = partial(newest_good, nearby, logs=with_earlier_parts(logs), other_than=path, known=known)
        other = newest(run=run)
        if self._take and other is not None and run is not None:
            self.refused, self.taken = f"{path} is bad: {reason}", other
            return other.path
        if missing:
            return None
        of_another = newest() if other is None else None
        offer = _offer(other, of_another, run)
        text = f"NaNGuard does not resume from {path}, because it is bad: {reason}. {offer}"
        raise BadCheckpointError(text, path, bad, other and other.path) from error


def _nearby(path: Path, folders: Iterable[Path]) -> list[Path]:
    """Folders that may have checkpoints of the same run: its own folder, the guard's folders there, and ``folders``."""
    guards = [path.parent / "nanguard", path.parent.parent / "nanguard", *folders]
    below = [
        child
        for folder in guards
        if folder.is_dir()
        for child in sorted(folder.iterdir())
        if (child / RUN_FILE).exists()
    ]
    return [path.parent, *guards, *below]


def _run_of(path: Path, content: Mapping[str, Any] | None, nearby: Iterable[Path]) -> str | None:
    """Id of the run that saved a checkpoint; ``""`` if it has none, ``None`` if that is not known."""
    if content is not None:
        return run_of(content)
    logs = [log for folder in nearby if (log := read_run(folder)) is not None]
    # If several runs have written to the same path, the file belongs to the last one.
    saved = [save for log in logs if (save := log.saved_by(path)) is not None]
    if saved:
        return max(saved)[1]
    if logs:
        return None
    runs = {run for file in checkpoint_files(nearby) if (run := run_of_file(file)) is not None}
    return runs.pop() if len(runs) == 1 else None


def _offer(other: Inspection | None, of_another: Inspection | None, run: str | None) -> str:
    """The end of the error, which says what to do next."""
    if other is None:
        no = f"There is no other good checkpoint {'of its run ' if of_another is not None else ''}near it"
        if of_another is not None:
            whose = f"run {of_another.run}" if of_another.run else "a run without the guard"
            no += f" ({of_another.path} is good, but it belongs to {whose})"
        return f"{no}. What to do: pass an older checkpoint as ckpt_path, or start anew without ckpt_path."
    newest = f"The newest good checkpoint near it is {other.path} (step {other.global_step})"
    if run is not None:
        return (
            f"{newest}, of the same run. What to do: pass that file as ckpt_path, or set "
            'NaNGuard(resume="last-good"), which takes it by itself.'
        )
    whose = f"of run {other.run}" if other.run else "of a run without the guard"
    return (
        f"{newest}, {whose}. The bad file cannot be read far enough to tell which run saved it, and no log of a run "
        "names it. So the guard takes no other file by itself. What to do: if you know that both files are from the "
        f"same run, pass {other.path} as ckpt_path; if not, start anew without ckpt_path."
    )


def _listed(tensors: list[str], named: int) -> str:
    more = len(tensors) - named
    return ", ".join(tensors[:named]) + (f" and {more} more" if more > 0 else "")

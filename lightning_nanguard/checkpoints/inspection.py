"""Checks whether a checkpoint file is whole and good, and finds the newest good one in some folders."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from lightning_nanguard.checkpoints.poison import KnownWeights, poisoned, state_of_guard
from lightning_nanguard.record.run_log import RunLog, with_earlier_parts

_EXTREMES = frozenset({"min", "max", "minimum", "maximum", "lowest", "highest", "best"})


@final
@dataclass(frozen=True, slots=True)
class Inspection:
    """The result of the check of a checkpoint file.

    Attributes:
        path: The file.
        damage: Why it cannot be read, in words; ``""`` if it can.
        tensors: Names of its tensors that are not finite and should be.
        global_step: The ``global_step`` at which it was written; ``None`` if the file does not contain it.
        whole_run: Whether it holds more than weights, so that a run can be resumed from it.
        run: Id of the guarded run that saved it; ``""`` if it has none.
    """

    path: Path
    damage: str = ""
    tensors: tuple[str, ...] = ()
    global_step: int | None = None
    whole_run: bool = False
    run: str = ""

    def good(self) -> bool:
        """Whether a run may be resumed from it."""
        return self.whole_run and not self.damage and not self.tensors


def run_of(checkpoint: Mapping[str, Any]) -> str:
    """Id of the guarded run that saved a checkpoint; ``""`` if the checkpoint has none."""
    run = state_of_guard(checkpoint).get("run")
    return run if isinstance(run, str) else ""


def run_of_file(path: Path) -> str | None:
    """Id of the guarded run that saved a checkpoint file; ``None`` if it cannot be read. The tensors are not read."""
    return _run_and_step(path)[0]


def _run_and_step(path: Path) -> tuple[str | None, int]:
    """Run and ``global_step`` of a checkpoint file, whose tensors are not read; ``None`` and -1 if it cannot be."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # any error of torch means that the file cannot be read
        return None, -1
    if not isinstance(checkpoint, Mapping):
        return None, -1
    step = checkpoint.get("global_step")
    return run_of(checkpoint), step if isinstance(step, int) else -1


def damage(path: Path) -> str:
    """Why a checkpoint file is not whole, in words; ``""`` if it is whole. A folder counts as whole, unchecked.

    A file that was cut short lacks the zip directory at its end. Parts that a power failure has damaged do not match
    their checksums, which ``torch.load`` does not compare.
    """
    if not path.is_file():
        return ""
    if not zipfile.is_zipfile(path):
        size = path.stat().st_size
        return f"it is cut short, or is not a checkpoint ({size:,} bytes without a zip directory at the end)"
    # A process that has turned checksums off has not written any.
    checked = getattr(torch.serialization, "get_crc32_options", lambda: True)()
    try:
        with zipfile.ZipFile(path) as file:
            if any(one.compress_type != zipfile.ZIP_STORED for one in file.infolist()):
                return "it is not a checkpoint (it holds compressed records, which torch does not write)"
            record = file.testzip() if checked else None
    except (OSError, zipfile.BadZipFile) as error:
        return f"it cannot be read ({error})"
    return f"its record {record} does not match its checksum" if record is not None else ""


def inspect(path: Path, known: KnownWeights | None = None) -> Inspection:
    """Check a checkpoint file, on the CPU and without running code from it.

    Args:
        path: The file.
        known: What is known of the module; ``None`` takes it from the file, by the names in its ``state_dict``: −inf is
            allowed in a tensor whose name says that it is a mask, and one whose name says that it is an extreme is not
            checked.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder) / "bad.ckpt"
        ...     torch.save({"global_step": 7, "state_dict": {"w": torch.tensor([float("inf")])}}, path)
        ...     inspect(path).tensors
        ('state_dict: w',)
    """
    if path.is_dir():
        return Inspection(path, "it is a folder of shards, and its index is a pickle, which the guard does not open")
    if path.exists() and not path.is_file():
        return Inspection(path, "it is not a file")
    try:
        wrong = damage(path)
        if wrong:
            return Inspection(path, wrong)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file that torch cannot read cannot be resumed from
        return Inspection(path, f"it cannot be read ({type(error).__name__}: {str(error).splitlines()[0]})")
    if not isinstance(checkpoint, Mapping) or not isinstance(checkpoint.get("state_dict"), Mapping):
        return Inspection(path, "it holds no state_dict")
    step = checkpoint.get("global_step")
    return Inspection(
        path,
        "",
        tuple(poisoned(checkpoint, _known_by_name(checkpoint["state_dict"]) if known is None else known)),
        step if isinstance(step, int) else None,
        "optimizer_states" in checkpoint and "loops" in checkpoint,
        run_of(checkpoint),
    )


def _known_by_name(state: Mapping[str, Any]) -> KnownWeights:
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    allowed = {("buffer", name): value == -torch.inf for name, value in tensors.items() if "mask" in name}
    own = {name for name in tensors if not _EXTREMES.isdisjoint(re.split(r"[\W\d_]+", name.lower()))}
    return KnownWeights(tensors, allowed, own)


def checkpoint_files(folders: Iterable[Path]) -> list[Path]:
    """The checkpoint files in some folders. Folders that do not exist are ignored."""
    return [file for folder in folders if folder.is_dir() for file in folder.glob("*.ckpt") if file.is_file()]


def folders_of_run(log: RunLog) -> list[Path]:
    """The folders with the checkpoints of a run, including those from before it was resumed."""
    folders = [log.folder.parent / "checkpoints"]
    for part in with_earlier_parts([log]):
        saved = (Path(os.path.normpath(part.folder / path)).parent for path in part.saved)
        folders += [part.folder, *saved]
    return list(dict.fromkeys(folders))


def newest_good(
    folders: Iterable[Path],
    *,
    logs: Iterable[RunLog] = (),
    other_than: Path | None = None,
    run: str | None = None,
    known: KnownWeights | None = None,
) -> Inspection | None:
    """The newest checkpoint file from which a run may be resumed.

    The newest one is that of the newest run, of its newest fit, and with the highest ``global_step``. The time of a
    file decides only between equals, because copies of files get a new one.

    Args:
        folders: The folders to search. Folders that do not exist are ignored.
        logs: Logs of the run, which say which fit saved a file. A file that they do not name counts as one of the
            newest fit.
        other_than: A file to leave out.
        run: Id of the run that the file has to belong to; ``None`` for any run.
        known: See :func:`inspect`.
    """
    unwanted = other_than.resolve() if other_than is not None else None
    saved = {path: begun for log in logs for path, begun in log.fits_of_files().items()}
    newest = max(saved.values(), default=0.0)
    found: list[tuple[str, float, int, int, Path]] = []
    for file in {file.resolve() for file in checkpoint_files(folders)} - {unwanted}:
        of, step = _run_and_step(file)
        if run is None or of == run:
            found.append((of or "", saved.get(str(file), newest), step, file.stat().st_mtime_ns, file))
    for *_, file in sorted(found, reverse=True):  # ids of runs are in the order of time
        inspected = inspect(file, known)
        if inspected.good():
            return inspected
    return None

"""Keeps a bounded number of incidents of a run, each in a folder of its own."""

from __future__ import annotations

import logging
import shlex
import shutil
from collections import Counter
from pathlib import Path
from typing import final

from lightning_nanguard.diagnosis.bundle import Bundle, safetensors, to_import, write
from lightning_nanguard.thresholds.diagnosis import DEFAULT, BundleThresholds
from lightning_nanguard.types import Fault, Finding

_logger = logging.getLogger("lightning_nanguard")


@final
class BundleStore:
    """Writes a bounded number of incidents, each into its own folder. An error while writing does not end the run.

    Args:
        folder: The folder that holds the folders of the incidents.
        thresholds: How many incidents are kept.

    Raises:
        ModuleNotFoundError: If safetensors is not installed.
    """

    def __init__(self, folder: Path, thresholds: BundleThresholds = DEFAULT.bundles) -> None:
        safetensors()
        self.folder = folder
        self._thresholds = thresholds
        self._kept: Counter[tuple[str, str]] = Counter()

    def due(self, fault: Fault, finding: Finding | None) -> bool:
        """Whether to keep another incident of this kind."""
        limits, same = self._thresholds, self._kept[_kind(fault, finding)]
        return same < limits.max_per_kind and self._kept.total() < limits.max_bundles

    def keep(self, bundle: Bundle, global_step: int) -> Path | None:
        """Write an incident; return its folder, or ``None`` if it could not be written."""
        self._kept[_kind(bundle.fault, bundle.finding)] += 1
        path = _unused(self.folder / f"step_{global_step:07d}_{bundle.fault.kind}")
        partial = path.with_name(f".{path.name}")  # renamed when it is complete
        try:
            partial.mkdir(parents=True)
            write(bundle, partial)
            partial.rename(path)
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)
            _logger.warning(
                "NaNGuard: the incident of step %d could not be saved in %s: %s: %s. Training goes on.",
                global_step,
                self.folder,
                type(error).__name__,
                error,
            )
            return None
        command = shlex.join(["nanguard", "replay", str(path), "--module", to_import(bundle.module)])
        _logger.warning(
            "NaNGuard: the batch and the state before the step are saved in %s. To run them again: %s", path, command
        )
        return path


def _kind(fault: Fault, finding: Finding | None) -> tuple[str, str]:
    return fault.kind, "" if finding is None else finding.cause


def _unused(path: Path) -> Path:
    number = 2
    unused = path
    while unused.exists():
        unused = path.with_name(f"{path.name}_{number}")
        number += 1
    return unused

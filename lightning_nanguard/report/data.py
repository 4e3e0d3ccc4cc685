"""Reads the files in the folder of a run, and describes in words what was measured around an intervention."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar, final

from lightning_nanguard.record.curve import CURVE_FILE, CurvePoint, final_points, read_curve
from lightning_nanguard.record.files import ADVICE_FILE, RECORDS_FILE, read_file, read_records
from lightning_nanguard.record.layer_norms import LAYER_NORMS_FILE, LayerNorms, read_layer_norms
from lightning_nanguard.record.receipts import RECEIPTS_FILE, Receipt
from lightning_nanguard.record.run_folder import is_alive
from lightning_nanguard.record.run_log import RunLog, earlier_parts, find_runs, read_run
from lightning_nanguard.record.summary import mostly_skipped
from lightning_nanguard.record.trials import TRIALS_FILE, HeldTrial
from lightning_nanguard.thresholds.report import REPORT
from lightning_nanguard.types import Advice, Intervention

_Item = TypeVar("_Item")

_NOT_KEPT = frozenset({"skip", "undo", "restore", "redo"})
"""Remedies after which the weights do not have the update whose loss was measured."""


@final
@dataclass(frozen=True, slots=True)
class RunData:
    """The data of a run, read from its folder.

    Attributes:
        folder: The folder of the run.
        log: Its log; ``None`` for a run of version 0.1.0.
        alive: Whether it is still running in another process.
        curve: The points of its curves, in the order in which they were written.
        interventions: Its interventions, oldest first.
        advice: Its advice.
        layer_norms: Gradient norms of the layers at interventions.
        receipts: Its receipts.
        earlier: Its logs in earlier folders, before it was resumed, oldest first.
        trials: The results of its trials.
    """

    folder: Path
    log: RunLog | None = None
    alive: bool = False
    curve: Sequence[CurvePoint] = ()
    interventions: Sequence[Intervention] = ()
    advice: Sequence[Advice] = ()
    layer_norms: Sequence[LayerNorms] = ()
    receipts: Sequence[Receipt] = ()
    earlier: Sequence[RunLog] = ()
    trials: Sequence[HeldTrial] = ()

    @property
    def end(self) -> Mapping[str, Any]:
        """How the newest fit ended, as in its log; empty if it goes on, was killed, or has no log."""
        return {} if self.log is None or self.log.ended is None else self.log.ended

    @property
    def stopped(self) -> bool:
        """Whether the guard ended the run."""
        return bool(self.interventions) and self.interventions[-1].ends_run

    @property
    def updates_lost(self) -> int:
        """Number of updates that rollbacks undid."""
        return sum(one.updates_lost for one in self.interventions if one.applied)

    @property
    def remedies(self) -> Counter[str]:
        """How often each remedy was used."""
        return Counter(word for one in self.interventions for word in one.remedies)

    @property
    def updates(self) -> int:
        """Number of updates of the whole run. Steps that were trained again after a resume count once."""
        known = self.end.get("updates")
        if isinstance(known, int):
            return known
        return sum(one.updates for one in final_points([one for one in self.curve if one.optimizer == 0]))

    @property
    def resumed_at(self) -> list[int]:
        """The steps from which it was resumed, oldest first."""
        fits = [] if self.log is None else [fit for log in (*self.earlier, self.log) for fit in log.fits]
        return [step for fit in fits[1:] if isinstance(step := fit.get("step"), int)]

    @property
    def of_last_fit(self) -> tuple[int, int] | None:
        """Number of updates and interventions since the last resume; ``None`` without a resume, or if not known."""
        updates = self.end.get("updates_of_fit")
        return (updates, self.logged_of_last_fit) if self.resumed_at and isinstance(updates, int) else None

    @property
    def logged_of_last_fit(self) -> int:
        """Number of interventions of the newest fit by the log of the run, which may have more than the records."""
        faults = self.end.get("faults")
        counts = faults.values() if isinstance(faults, dict) else ()
        return sum(count for count in counts if isinstance(count, int))

    @property
    def unreadable(self) -> int:
        """Number of interventions that the log of the run counts and that cannot be read; 0 for a resumed run."""
        return 0 if self.resumed_at else max(0, self.logged_of_last_fit - len(self.interventions))

    @property
    def mostly_skipped(self) -> str:
        """A message if most of its updates were skipped; else ``""``."""
        skipped = sum("skip" in one.remedies for one in self.interventions if one.applied)
        return mostly_skipped(skipped, self.updates)

    @property
    def first_skipped(self) -> int | None:
        """``global_step`` of the first skipped update; ``None`` if none was skipped."""
        return next((one.global_step for one in self.interventions if "skip" in one.remedies and one.applied), None)

    @property
    def kept(self) -> list[CurvePoint]:
        """The points of its curves without the losses of updates that the guard skipped or undid."""
        removed = {one.global_step for one in self.interventions if one.applied and _NOT_KEPT & set(one.remedies)}
        # The loss of several updates is the mean of the finite ones. It counts unless there were none.
        return [
            one
            for one in self.curve
            if not (one.step in removed and (one.updates == 1 or one.loss is None or not math.isfinite(one.loss)))
        ]

    @property
    def rate_now(self) -> float | None:
        """The effective learning rate of the newest update of the first optimizer."""
        return next((point.lr for point in reversed(self.curve) if point.optimizer == 0 and point.lr is not None), None)

    def losses_at_ends(self) -> tuple[float | None, float | None]:
        """Median loss of the first optimizer at the beginning and at the end of the curves; ``None`` without a loss.

        The losses of updates that the guard skipped or undid do not count.
        """
        known = [one.loss for one in self.kept if one.optimizer == 0 and one.loss is not None]
        finite = [loss for loss in known if math.isfinite(loss)]
        if not finite:
            return None, None
        rows = REPORT.rows_around
        return median(finite[:rows]), median(finite[-rows:]) if math.isfinite(known[-1]) else known[-1]

    def norms_at(self, intervention: Intervention) -> LayerNorms | None:
        """The norms of the layers at an intervention; ``None`` if none were written."""
        key = (intervention.run, intervention.global_step, intervention.fault)
        return next((one for one in self.layer_norms if (one.run, one.global_step, one.fault) == key), None)

    def losses_around(self, intervention: Intervention) -> tuple[float | None, float | None]:
        """Median loss before and after an intervention; ``None`` if there is no finite loss."""
        step, rows = intervention.global_step, REPORT.rows_around
        known = [(one.step, one.loss) for one in self.kept if one.loss is not None and math.isfinite(one.loss)]
        before = [loss for at, loss in known if at <= step][-rows:]
        after = [loss for at, loss in known if at > step + 1][:rows]
        return (median(before) if before else None), (median(after) if after else None)


def read_run_data(folder: Path) -> RunData:
    """Read the files in the folder of a run and in its earlier folders. The data of missing files is empty."""
    log = read_run(folder)
    earlier = [] if log is None else earlier_parts(log)
    folders = [*(part.folder for part in earlier), folder]
    return RunData(
        folder,
        log,
        is_alive(folder),
        _all(folders, CURVE_FILE, read_curve),
        _all(folders, RECORDS_FILE, read_records),
        _all(folders, ADVICE_FILE, partial(read_file, parse=Advice.from_dict)),
        _all(folders, LAYER_NORMS_FILE, read_layer_norms),
        _all(folders, RECEIPTS_FILE, partial(read_file, parse=Receipt.from_dict)),
        earlier,
        _all(folders, TRIALS_FILE, partial(read_file, parse=HeldTrial.from_dict)),
    )


def _all(folders: Sequence[Path], name: str, read: Callable[[Path], Sequence[_Item]]) -> list[_Item]:
    return [item for folder in folders if (folder / name).is_file() for item in read(folder / name)]


def find_run(where: Path) -> Path | None:
    """The folder of a run: the given one, or that of the newest run below it; ``None`` if there is no run."""
    if read_run(where) is not None or (where / RECORDS_FILE).is_file():
        return where
    runs = find_runs(where)
    if runs:
        return runs[-1].folder
    return max((path.parent for path in where.rglob(RECORDS_FILE)), default=None)


def loss_around(intervention: Intervention, data: RunData) -> list[str]:
    """The loss before and after an intervention in words; empty if one of them is not known."""
    before, after = data.losses_around(intervention)
    if before is None or after is None:
        return []
    return [f"loss {before:.4g} before, {after:.4g} after (medians of up to {REPORT.rows_around} recorded losses)"]


def recorded_around(intervention: Intervention, data: RunData) -> list[str]:
    """The loss around an intervention, and the layers whose gradient norms changed most before it, one line each."""
    lines = loss_around(intervention, data)
    norms = data.norms_at(intervention)
    if norms is not None and len(norms.updates) > 1:
        known = {name: [one for one in values if one is not None] for name, values in norms.layers.items()}
        # What was not finite before says nothing about the change.
        changed = {name: one for name, one in known.items() if len(one) > 1 and math.isfinite(one[0])}
        told = [f"{name} {one[0]:.3g} → {one[-1]:.3g}" for name, one in changed.items()]
        if told:
            more = len(told) - REPORT.layers_in_text
            rest = f", and {more:,} more" if more > 0 else ""
            shown = ", ".join(told[: REPORT.layers_in_text])
            lines.append(f"gradient norms in the last {len(norms.updates)} updates: {shown}{rest}")
    return lines

"""What the guard installs on a trainer before a fit begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

from lightning_nanguard.act.patches import call_nothing
from lightning_nanguard.checkpoints.resume_gate import ResumeGate
from lightning_nanguard.record.bad_samples import KnownSamples
from lightning_nanguard.trainer.arguments import Arguments
from lightning_nanguard.trainer.private.callbacks import put_first
from lightning_nanguard.trainer.private.data_order import DataOrder
from lightning_nanguard.trainer.private.packages import LightningModule, Trainer
from lightning_nanguard.trainer.private.saving import before_resuming


@final
class BeforeFit:
    """Makes the guard the first callback, checks the checkpoint to resume from, and watches the data.

    Attributes:
        order: Gives the rows of each batch; ``None`` outside of a fit. A loader may draw its first batches before any
            hook.
    """

    def __init__(self) -> None:
        self.order: DataOrder | None = None
        self._gate: ResumeGate | None = None
        self._undo_gate: Callable[[], None] = call_nothing
        # Gives the guard the place among the callbacks that the user gave it.
        self._put_back: Callable[[], None] = call_nothing

    def install(self, trainer: Trainer, module: LightningModule, guard: Any, arguments: Arguments) -> None:
        """Install everything on a trainer.

        Args:
            trainer: The trainer.
            module: Its module.
            guard: The callback.
            arguments: The arguments of the guard.
        """
        self._put_back()
        self._put_back = put_first(trainer, guard)
        self._undo_gate()
        self._gate = ResumeGate(
            module,
            [] if arguments.dirpath is None else [arguments.dirpath],
            take=arguments.resume == "last-good",
            observe=arguments.observe,
            thresholds=arguments.thresholds.checkpoints,
        )
        self._undo_gate = before_resuming(trainer, self._gate)
        self.watch_data(trainer, arguments)

    def watch_data(self, trainer: Trainer, arguments: Arguments) -> DataOrder:
        """From now on, record the rows of each batch."""
        self.leave_data()
        known = KnownSamples(quarantine=arguments.quarantine and not arguments.observe)
        self.order = DataOrder(trainer, known, arguments.thresholds.samples.batches_waiting)
        return self.order

    def know_samples(self, state: Mapping[str, Any]) -> None:
        """Load the bad samples of the resumed run, before the first batch.

        Args:
            state: The state of its guard.
        """
        if self.order is not None:
            self.order.known.load_state_dict(state.get("samples", {}))

    def end_resuming(self) -> str | None:
        """Check no further checkpoint; return which one the run resumes from instead of the user's, in words."""
        self._undo_gate()
        gate, self._gate = self._gate, None
        if gate is None or gate.taken is None:
            return None
        return f"{gate.refused}; the run resumes from {gate.taken.path} (step {gate.taken.global_step}) instead"

    def leave_data(self) -> None:
        """Remove everything from the loaders."""
        order, self.order = self.order, None
        if order is not None:
            order.close()

    def close(self) -> None:
        """Remove everything from the trainer."""
        self.end_resuming()
        self._put_back()
        self.leave_data()
        self._undo_gate = self._put_back = call_nothing

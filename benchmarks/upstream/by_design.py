"""Which of Lightning's own tests cannot pass with the guard in the Trainer, and why."""

from __future__ import annotations

_LOGS = "compares every call of a logger; the guard logs curves and settings of its own"
_FOLDER = "lists a folder; the guard writes the records of a run without a logger to one"
_PROCESSES = "uses a strategy for one device with two processes, which the guard refuses"
_REASONS: dict[str, str] = {
    "test_throughput_monitor_": _LOGS,
    "test_adding_datamodule_hparams": _LOGS,
    "test_validation_step_log_with_tensorboard": _LOGS,
    "test_log_metrics_epoch_step_values": _LOGS,
    "test_log_on_train_start": _LOGS,
    "test_log_every_n_steps": _LOGS,
    "test_hpc_restore_attempt": _FOLDER,
    "test_skip_training_step_not_allowed[2]": _PROCESSES,
}
"""By the beginning of the test's name."""


def reason(name: str) -> str | None:
    """Why a test fails with the guard by design; ``None`` if it should pass."""
    test = name.rpartition("::")[2]
    return next((why for beginning, why in _REASONS.items() if test.startswith(beginning)), None)

"""Shows a guard and its run: as a line, in a notebook, as a figure."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_nanguard.record.html import escaped, interventions_table, table
from lightning_nanguard.record.messages import describe_advice
from lightning_nanguard.record.receipts import Receipt
from lightning_nanguard.report.data import read_run_data
from lightning_nanguard.report.figure import draw, matplotlib
from lightning_nanguard.trainer.fit_summary import NO_FIT, fit_summary
from lightning_nanguard.trainer.guard_state import StatefulGuard
from lightning_nanguard.types import Advice, Intervention


class DisplayedGuard(StatefulGuard):
    """The part of :class:`~lightning_nanguard.NaNGuard` that shows the guard and its run."""

    @property
    def interventions(self) -> Sequence[Intervention]:
        """The records of the newest interventions, oldest first. All of them are on disk."""
        return self._memory

    @property
    def advice(self) -> Sequence[Advice]:
        """The advice of the last fit: what the guard noticed and did not act on, such as in the preflight."""
        return tuple(self._memory.advice)

    @property
    def receipts(self) -> Sequence[Receipt]:
        """The receipts of the last fit: whether interventions in a run with finite numbers helped."""
        return tuple(self._memory.receipts)

    @property
    def run_dir(self) -> Path | None:
        """Folder with the records of the run; ``None`` before the first fit, or if other processes make the updates."""
        folder = self._memory.run.get("folder")
        return None if folder is None else Path(folder)

    def summary(self) -> str:
        """Return one line about the present or last fit, with the counts of the whole run if it was resumed.

        If this process has seen no fit, the line says so, and where to look if other processes made the updates.
        """
        if self._fit is None and self.run_dir is None:
            return NO_FIT
        fit, given = self._fit, self._given or self._arguments
        updates = fit.guard.updates if fit is not None else self._memory.run.get("updates", 0)
        return fit_summary(self._memory, given, updates, self.lr_multiplier, self.run_dir)

    def plot(self) -> Any:
        """Draw the curves of the run with the interventions and rollbacks of the guard.

        Returns:
            A ``matplotlib.figure.Figure``; save it with ``figure.savefig("run.png")``.

        Raises:
            RuntimeError: Before the first fit.
            ModuleNotFoundError: If matplotlib is not installed.
        """
        folder = self.run_dir
        if folder is None:
            raise RuntimeError(
                "NaNGuard.plot() draws a run: call it during or after a fit. If other processes made the updates "
                "(ddp_spawn, ddp_fork, ddp_notebook), use nanguard report RUN_DIR."
            )
        if self._fit is not None and self._fit.context.curve is not None:
            self._fit.context.curve.write()
        data = read_run_data(folder)
        if not data.interventions:  # on other ranks, or where nothing can be written
            data = replace(data, interventions=tuple(self._memory))
        pyplot = matplotlib("matplotlib.pyplot")
        figure = draw(data, pyplot.figure())
        if "inline" in pyplot.get_backend():
            pyplot.close(figure)  # a notebook shows what a cell returns, and would show what is open once more
        return figure

    def _settings(self) -> dict[str, Any]:
        """The settings of the guard that are not the defaults, and those that say most about it."""
        given = self._given or self._arguments  # as the environment has switched them
        defaults = {name: one.default for name, one in inspect.signature(type(self)).parameters.items()}
        shown: dict[str, Any] = {"act_on": given.act_on, "observe": given.observe}
        for name, default in defaults.items():
            value = getattr(given, name, default)
            if name in ("detectors", "remedies", "sinks", "rules"):
                if value:
                    shown[name] = [_named(one) for one in value]
                elif name == "remedies":
                    shown[name] = []
            elif name in ("budget", "thresholds"):
                if value != type(value)():
                    shown[name] = value
            elif value != default:
                shown[name] = str(value) if isinstance(value, Path) else value
        return shown

    def __repr__(self) -> str:
        """The guard with its settings."""
        words = ", ".join(
            f"{name}=[{', '.join(value)}]" if isinstance(value, list) else f"{name}={value!r}"
            for name, value in self._settings().items()
        )
        return f"{type(self).__name__}({words})"

    def _repr_html_(self) -> str:
        given = self._settings().items()
        settings = [(name, ", ".join(value) if isinstance(value, list) else value) for name, value in given]
        advice = "".join(f"<li>{escaped(describe_advice(one))}</li>" for one in self._memory.advice)
        return (
            f"<p><b>{escaped(self.summary())}</b></p>"
            f"{interventions_table(tuple(self._memory), self._memory.total)}"
            f"{f'<p>Advice</p><ul>{advice}</ul>' if advice else ''}"
            f"<details><summary>Settings</summary>{table(('setting', 'value'), settings)}</details>"
        )


def _named(part: Any) -> str:
    part = getattr(part, "function", part)
    return str(getattr(part, "__name__", type(part).__name__))

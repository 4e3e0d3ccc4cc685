"""A sink that counts interventions by cause."""

from __future__ import annotations

import json
from collections import Counter

from lightning_nanguard import Intervention, RunInfo, Sink


class Tally(Sink):
    """Writes ``tally.json`` beside the records at the end of a fit: how often each cause was found."""

    def open(self, run: RunInfo) -> None:
        """A fit begins."""
        self.counts: Counter[str] = Counter()
        self.path = run.dirpath / "tally.json"

    def write(self, intervention: Intervention) -> None:
        """Count one."""
        self.counts[intervention.cause or "unknown"] += 1

    def close(self) -> None:
        """The fit is over."""
        if self.counts:
            self.path.write_text(json.dumps(self.counts), encoding="utf-8")

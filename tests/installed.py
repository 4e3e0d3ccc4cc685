"""Checks an installed package in an empty environment: ``python -I tests/installed.py pytorch-lightning``.

It is no test for pytest: it needs nothing but the package, and runs outside of the checkout.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
from importlib.metadata import distribution, version
from pathlib import Path

LIMIT_MS = 200
"""Milliseconds that ``import lightning_nanguard`` may take; it loads neither torch nor Lightning."""


def import_time() -> float:
    """Milliseconds of the import, the best of five."""
    code = (
        "import sys, time; start = time.perf_counter(); import lightning_nanguard; "
        "print(1000 * (time.perf_counter() - start)); "
        "assert not {'torch', 'pytorch_lightning', 'lightning'} & {*sys.modules}"
    )
    tries = [subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, check=True) for _ in range(5)]
    return min(float(one.stdout) for one in tries)


def train(package: str) -> None:
    """One epoch in which a row is NaN, with the package's own Trainer."""
    torch = importlib.import_module("torch")
    pl = importlib.import_module("lightning.pytorch" if package == "lightning" else "pytorch_lightning")
    guard = importlib.import_module("lightning_nanguard").NaNGuard()

    class Model(pl.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, batch: object, batch_idx: int) -> object:
            return self.layer(batch).square().mean()

        def configure_optimizers(self) -> object:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    rows = torch.randn(64, 4)
    rows[20] = torch.nan
    model = Model()
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[guard], **quiet)
    trainer.fit(model, torch.utils.data.DataLoader(rows, batch_size=8))
    assert [one.remedies for one in guard.interventions] == [("skip",)]
    assert model.layer.weight.isfinite().all()


def main(package: str) -> None:
    """All checks, and what was tried in one line."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        milliseconds = import_time()
        assert milliseconds < LIMIT_MS, f"the import takes {milliseconds:.0f} ms"
        train(package)
        command = Path(sys.executable).with_name("nanguard")
        shown = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout.strip()
        assert shown == f"nanguard {version('lightning-nanguard')}"
        files = [str(one) for one in distribution("lightning-nanguard").files or ()]
        assert "lightning_nanguard/py.typed" in files
        assert not [one for one in files if one.startswith(("tests", "website", "benchmarks"))]
        python = sys.version.split()[0]
        print(f"Python {python}, {package} {version(package)}: installed, trains, import in {milliseconds:.0f} ms")
        os.chdir("/")


if __name__ == "__main__":
    main(*sys.argv[1:])

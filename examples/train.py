"""Train the digits classifier from a YAML file that adds the guard by class path.

    python examples/train.py fit --config examples/config.yaml

Needs the extras ``cli`` and ``demo``. ``LIGHTNING_PACKAGE=lightning.pytorch`` trains with that package instead of
``pytorch_lightning``; the file stays the same.
"""

from __future__ import annotations

import importlib

from digits import DigitsClassifier, DigitsDataModule, pl

LightningCLI = importlib.import_module(f"{pl.__name__}.cli").LightningCLI


class DigitsCLI(LightningCLI):
    """The usual command line, with a last line that says how well the model reads digits it has not seen."""

    def after_fit(self) -> None:
        metrics = self.trainer.callback_metrics
        print(f"held-out accuracy {metrics['val_acc']:.3f}, held-out loss {metrics['val_loss']:.3g}")


if __name__ == "__main__":
    DigitsCLI(DigitsClassifier, DigitsDataModule, save_config_kwargs={"overwrite": True})

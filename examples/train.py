"""Train the digits classifier from a YAML file that adds the guard by class path.

    python examples/train.py fit --config examples/config.yaml

Needs the extras ``cli`` and ``demo``. With ``LIGHTNING_PACKAGE=lightning.pytorch`` in the environment it uses that
package instead of ``pytorch_lightning``.
"""

from __future__ import annotations

import importlib

from digits import DigitsClassifier, DigitsDataModule, pl

LightningCLI = importlib.import_module(f"{pl.__name__}.cli").LightningCLI


class DigitsCLI(LightningCLI):
    """The command line of Lightning, with a last line that gives the accuracy on held-out digits."""

    def after_fit(self) -> None:
        metrics = self.trainer.callback_metrics
        print(f"held-out accuracy {metrics['val_acc']:.3f}, held-out loss {metrics['val_loss']:.3g}")


if __name__ == "__main__":
    DigitsCLI(DigitsClassifier, DigitsDataModule, save_config_kwargs={"overwrite": True})

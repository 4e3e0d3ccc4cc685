"""The smallest run that shows what the guard does: one row of the data has a NaN.

python examples/quickstart.py
"""

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_nanguard import NaNGuard


class Regression(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        return torch.nn.functional.mse_loss(self.layer(inputs), targets)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


pl.seed_everything(0)
inputs = torch.randn(1024, 4)
targets = inputs.sum(1, keepdim=True)
inputs[123, 2] = float("nan")

model = Regression()
guard = NaNGuard()
trainer = pl.Trainer(callbacks=[guard], max_epochs=3, enable_progress_bar=False, enable_model_summary=False)
trainer.fit(model, DataLoader(TensorDataset(inputs, targets), batch_size=32, shuffle=True))

print("weights:", [round(weight, 3) for weight in model.layer.weight[0].tolist()])

"""Lightning: the layers in a LightningModule, the loss of the network's own logits, IoU without a prediction."""

import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

import fastseg


class Segmentation(lightning.LightningModule):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.network = fastseg.models.UNet(num_classes=classes, widths=(8, 16, 32))
        self.loss = fastseg.UpsampleCrossEntropyLoss(ignore_index=255)
        self.matrix = fastseg.metrics.ConfusionMatrix(classes, ignore_index=255)

    def training_step(self, batch, index):
        return self.loss(self.network.logits(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.matrix.update_from_logits(self.network.logits(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


data = DataLoader(TensorDataset(torch.rand(4, 3, 64, 64), torch.randint(5, (4, 64, 64))), batch_size=2)
module = Segmentation(classes=5)
lightning.Trainer(max_epochs=1, logger=False, enable_checkpointing=False).fit(module, data, data)
scores = module.matrix.scores()  # of all batches, and of all ranks
print(scores.mean_iou)

"""segmentation_models_pytorch: one line for the model, another import for the loss."""

import segmentation_models_pytorch as smp
import torch

import fastseg
from fastseg.losses.smp import DiceLoss  # was: segmentation_models_pytorch.losses

model = smp.Unet("resnet18", encoder_weights=None, classes=5)
model.compile(backend="fastseg")  # the line
optimizer, dice = torch.optim.SGD(model.parameters(), lr=0.01), DiceLoss("multiclass", ignore_index=255)

images, masks = torch.rand(2, 3, 64, 64), torch.randint(5, (2, 64, 64))
logits = model(images)
loss = dice(logits, masks) + fastseg.functional.cross_entropy(logits, masks, ignore_index=255)
loss.backward()
optimizer.step()
report = fastseg.report(model)
print(report)

"""MONAI: plain tensors for the model, and the loss by another import."""

import torch
from monai.data import MetaTensor
from monai.networks.nets import BasicUNet

import fastseg
from fastseg.losses.monai import DiceCELoss  # was: monai.losses

model = BasicUNet(spatial_dims=2, out_channels=5, features=(8, 8, 16, 16, 32, 8))
model.compile(backend="fastseg")
criterion = DiceCELoss(to_onehot_y=True, softmax=True)

batch = {"image": MetaTensor(torch.rand(2, 1, 64, 64)), "label": torch.randint(5, (2, 1, 64, 64))}
logits = model(batch["image"].as_tensor())  # of a MetaTensor, TorchDynamo would capture each call alone
loss = criterion(logits, batch["label"])
loss.backward()
report = fastseg.report(model)
print(report)

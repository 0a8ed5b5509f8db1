"""torchvision: the model upsamples its logits itself; with the loss in the same function they are never in memory."""

import torch
import torch.nn.functional as F
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

import fastseg

model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)


@torch.compile(backend="fastseg")
def loss_of(images, masks):
    return F.cross_entropy(model(images)["out"], masks, ignore_index=255)


loss = loss_of(torch.rand(4, 3, 64, 64), torch.randint(5, (4, 64, 64)))
loss.backward()
optimizer.step()
report = fastseg.report(model)
print(report)  # interpolate + cross_entropy -> upsample_cross_entropy

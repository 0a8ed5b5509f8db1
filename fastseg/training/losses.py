"""The losses of a training run, of logits at a network's own resolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastseg import reference
from fastseg.training.config import LossKind
from fastseg.training.networks import Network, operators_of

_FOCAL_GAMMA = 2.0  # the paper's


def mean_squared_error(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Squared error between the softmax and the one-hot truth, ``mean((softmax(logits)[c] - [target = c])^2)``.

    Args:
        logits: Floating point ``[N, C, H, W]``.
        target: Class indices ``[N, H, W]``.
        ignore_index: Pixels with this label are left out of the mean.

    Returns:
        A scalar: the mean over the counted pixels and the classes; nan where no pixel counts.
    """
    counted = target != ignore_index
    truth = F.one_hot(torch.where(counted, target, 0).long(), logits.shape[1]).movedim(-1, 1)
    errors = (logits.softmax(1) - truth).square().mean(1)
    return torch.where(counted, errors, 0).sum() / counted.sum()


class Loss(nn.Module):
    """A loss between the logits of a network, upsampled to the labels' size, and labels.

    The upsampled logits are never in memory, but for ``"mse"`` and for networks without fastseg's operators.

    Args:
        network: Whose logits they are; says how they are upsampled and by which operators.
        kind: As in `TrainConfig`.
        ignore_index: Label of the pixels that don't count.
        class_weights: ``[num_classes]``; None for equal ones.
        label_smoothing: As in `TrainConfig`.
    """

    class_weights: Tensor | None

    def __init__(
        self, network: Network, kind: LossKind, ignore_index: int, class_weights: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.kind = kind
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.backend, self.grid = network.backend, network.grid
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, logits: Tensor, masks: Tensor) -> Tensor:
        """The loss between logits ``[N, C, h, w]`` and labels ``[N, H, W]``; nan where no pixel counts."""
        operators = operators_of(self.backend)
        weight, ignored, smoothing = self.class_weights, self.ignore_index, {"label_smoothing": self.label_smoothing}
        if self.kind == "mse":
            return mean_squared_error(reference.upsample(logits, masks.shape[-2:], None, **self.grid), masks, ignored)
        if self.kind == "ce":
            return operators.upsample_cross_entropy(logits, masks, weight, ignored, **smoothing, **self.grid)
        if self.kind == "focal":
            return operators.upsample_focal_loss(logits, masks, weight, ignored, gamma=_FOCAL_GAMMA, **self.grid)
        return operators.upsample_cross_entropy_dice(
            logits, masks, weight, ignored, ce_weight=float(self.kind != "dice"), **smoothing, **self.grid
        )

    def share(self, class_pixels: Tensor, images: int) -> float:
        """How much the loss of a batch counts in that of a set, given its pixels of each class and its images.

        That of the set is then what it would be of one batch, but for a Dice and for the weights of a focal loss.
        """
        if "dice" in self.kind:
            return float(images)
        counts = class_pixels.double()
        weighed = self.kind == "ce" and self.class_weights is not None
        return (counts @ self.class_weights.double() if weighed else counts.sum()).item()  # type: ignore[union-attr]

"""One epoch of training and one of validation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastseg import reference
from fastseg.data import DataError
from fastseg.metrics import Scores, scores
from fastseg.models import SegmentationModel
from fastseg.training.batches import Example, Preparation
from fastseg.training.checkpoint import Metadata
from fastseg.training.config import LossKind
from fastseg.training.distributed import World
from fastseg.training.errors import DivergedError


class Evaluation(NamedTuple):
    """What a network reaches on a split.

    Args:
        loss: The loss over all labelled pixels.
        scores: What `fastseg.metrics.scores` makes of the confusion matrix.
    """

    loss: float
    scores: Scores


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


class NetworkWithLoss(nn.Module):
    """A network and its loss as one module: DistributedDataParallel sees only what goes through ``forward``.

    Args:
        model: The network.
        kind: ``"ce"`` or ``"mse"``.
        ignore_index: Label of the pixels that don't count.
        class_weights: Weight of each class in ``"ce"``, ``[num_classes]``.
        label_smoothing: Label smoothing of ``"ce"``.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        model: SegmentationModel,
        kind: LossKind,
        ignore_index: int,
        class_weights: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.kind = kind
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, images: Tensor, masks: Tensor) -> Tensor:
        """The mean loss over the labelled pixels of a batch; nan where there is none."""
        return self.loss(self.model.logits(images), masks)

    def loss(self, logits: Tensor, masks: Tensor) -> Tensor:
        """The same, from what the network's ``logits`` gives for the images."""
        if self.kind == "mse":
            upsampled = reference.upsample(logits, masks.shape[-2:], None, "bilinear", False)
            return mean_squared_error(upsampled, masks, self.ignore_index)
        return self.model.upsample_cross_entropy(
            logits,
            masks,
            self.class_weights,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )

    def share(self, class_pixels: Tensor) -> float:
        """What the mean of ``forward`` is divided by, given the pixels of each class, ``[num_classes]``."""
        counts = class_pixels.double()
        return (counts.sum() if self.class_weights is None else counts @ self.class_weights.double()).item()


def with_loss(model: SegmentationModel, metadata: Metadata) -> NetworkWithLoss:
    """The network with the loss that its metadata describes."""
    config, weights = metadata.config, metadata.class_weights
    return NetworkWithLoss(
        model,
        config.loss,
        metadata.ignore_index,
        None if weights is None else torch.tensor(weights),
        config.label_smoothing,
    )


def train_epoch(
    network: nn.Module,
    batches: Iterable[Example],
    prepare: Preparation,
    optimizer: torch.optim.Optimizer,
    world: World,
    on_step: Callable[[float, int], None],
) -> float:
    """Train on every batch once.

    With several processes, each step's gradient is the mean of the processes' gradients (DistributedDataParallel's
    convention): a labelled pixel weighs more on a process that has fewer of them.

    Args:
        network: `NetworkWithLoss`, alone or in DistributedDataParallel.
        batches: ``(images, masks)`` as loaded.
        prepare: Makes the network's input of them.
        optimizer: Steps after each batch.
        world: The processes of the run.
        on_step: Called after each step with its loss and its images, of all processes.

    Returns:
        The mean of the steps' losses, each counted by its images.

    Raises:
        DivergedError: A loss is not finite.
    """
    network.train()
    total, seen = 0.0, 0
    for step, (loaded_images, loaded_masks) in enumerate(batches, start=1):
        images, masks = prepare(loaded_images, loaded_masks)
        loss = network(images, masks)
        value = world.sum(loss.detach()).item() / world.size
        if not math.isfinite(value):
            raise DivergedError(
                f"the loss of step {step} is {value}; a lower lr helps where the run diverges, "
                "a larger batch_size where a batch has no labelled pixel"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        count = len(images) * world.size
        total, seen = total + value * count, seen + count
        on_step(value, count)
    return total / seen


def evaluate_batches(
    network: NetworkWithLoss, batches: Iterable[Example], prepare: Preparation, world: World
) -> Evaluation:
    """The loss and the scores over the batches of all processes, which together see every image once.

    Args:
        network: The network and its loss, not wrapped.
        batches: ``(images, masks)`` as loaded: this process's part of the split.
        prepare: Makes the network's input of them.
        world: The processes of the run.

    Returns:
        The same on every process.

    Raises:
        DataError: No pixel of the split has a label that counts.
    """
    network.eval()
    classes = network.model.num_classes
    matrix = torch.zeros(classes, classes, dtype=torch.int64, device=prepare.device)
    loss_sum = torch.zeros((), dtype=torch.float64, device=prepare.device)
    for loaded_images, loaded_masks in batches:
        counts, loss = _evaluate_batch(network, *prepare(loaded_images, loaded_masks))
        if share := network.share(counts.sum(1)):
            loss_sum += loss.double() * share
        matrix += counts
    matrix, loss_sum = world.sum(matrix), world.sum(loss_sum)
    share = network.share(matrix.sum(1))
    if not share:
        raise DataError(f"no pixel of the split counts: ignore_index is {network.ignore_index}")
    return Evaluation(loss_sum.item() / share, scores(matrix))


@torch.no_grad()
def _evaluate_batch(network: NetworkWithLoss, images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """The confusion matrix and the loss; a function, so that no two batches' logits are in memory at once."""
    logits = network.model.logits(images)
    counts = network.model.upsample_confusion_matrix(logits, masks, network.ignore_index)
    return counts, network.loss(logits, masks)

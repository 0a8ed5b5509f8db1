"""Training and validation of any segmentation network as a LightningModule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from fastseg.data import DataError
from fastseg.metrics import ConfusionMatrix
from fastseg.training._lightning import LightningModule
from fastseg.training.config import LossKind, OptimizerKind, Schedule
from fastseg.training.errors import DivergedError
from fastseg.training.history import Evaluation
from fastseg.training.losses import Loss
from fastseg.training.networks import Network

_POLY_POWER = 0.9  # DeepLab's


class SegmentationTask(LightningModule):
    """A segmentation network with its loss, optimizer and scores: ``trainer.fit(SegmentationTask(model, 19), data)``.

    Batches are ``(images, masks)``: floating-point ``[N, C, H, W]`` as the network takes them, and class indices of any
    integer dtype ``[N, H, W]``, as `SegmentationData` gives them. Training logs "loss" at each step and "train_loss",
    validation "val_loss", "val_mean_iou" and "val_pixel_accuracy" at each epoch; `evaluation` has the classes' scores.

    Loss, confusion matrix and prediction take the network's logits at its own resolution: see `Network`.

    Args:
        model: A network; see `Network` for what it may give. ``model.compile(backend="fastseg")`` before this, or
            ``task.network.compile(backend="fastseg")`` after it, puts fastseg's operators into it.
        num_classes: Number of classes; None takes the network's attribute of this name.
        loss: As in `TrainConfig`, as are all that follow.
        ignore_index: Label of the pixels that don't count.
        class_weights: A weight for each class; None for equal ones.
        label_smoothing: Label smoothing of the cross-entropy.
        auxiliary_weight: How much each auxiliary head counts.
        optimizer: "sgd", "adam" or "adamw".
        lr: Learning rate; Lightning's tuner sets it.
        momentum: Momentum of SGD.
        weight_decay: Weight decay.
        schedule: "constant", "poly", "cosine" or "onecycle".
        warmup: Epochs of a linearly growing learning rate.

    Raises:
        DivergedError: In training, a loss is not finite.
        DataError: In validation, no pixel has a label that counts.
    """

    evaluation: Evaluation

    def __init__(
        self,
        model: nn.Module,
        num_classes: int | None = None,
        *,
        loss: LossKind = "ce",
        ignore_index: int = 255,
        class_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        auxiliary_weight: float = 0.5,
        optimizer: OptimizerKind = "adam",
        lr: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        schedule: Schedule = "constant",
        warmup: float = 0.0,
    ) -> None:
        super().__init__()
        self.network = model if isinstance(model, Network) else Network(model, num_classes)
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.loss = Loss(self.network, loss, ignore_index, weights, label_smoothing)
        self.auxiliary_weight = auxiliary_weight
        self.optimizer, self.lr, self.momentum, self.weight_decay = optimizer, lr, momentum, weight_decay
        self.schedule, self.warmup = schedule, warmup
        self.raises_diverged = True  # but in a test of learning rates, which ends where the loss does

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[N, num_classes, h, w]`` of images, at the network's own resolution."""
        return self.network.logits(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch, that of the auxiliary heads with it."""
        images, masks = batch
        main, *auxiliary = self.network(images)
        loss = self.loss(main, masks)
        for logits in auxiliary:
            loss = loss + self.auxiliary_weight * self.loss(logits, masks)
        value = self.trainer.strategy.reduce(loss.detach(), reduce_op="mean")  # every process sees the same
        if not math.isfinite(value) and self.raises_diverged:
            raise DivergedError(
                f"epoch {self.current_epoch + 1}: the loss of step {batch_idx + 1} is {float(value)}; a lower lr helps "
                "where the run diverges, a larger batch_size where a batch has no labelled pixel"
            )
        self.log("loss", value, prog_bar=True, on_step=True, on_epoch=False)
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=len(images), sync_dist=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Start counting."""
        self._matrix = ConfusionMatrix(self.network.num_classes, self.loss.ignore_index, device=self.device)
        self._losses = torch.zeros(2, dtype=torch.float64, device=self.device)  # weighed sum, sum of the weights

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count a batch, of one pass of the network; masks of different sizes come as a list."""
        images, masks = batch
        logits = self.network(images)[0]
        pairs = [(logits, masks)]
        if isinstance(masks, list):
            pairs = [(logits[i : i + 1], mask.unsqueeze(0)) for i, mask in enumerate(masks)]
        for some, truth in pairs:
            counts = self.network.operators.upsample_confusion_matrix(
                some, truth, self.loss.ignore_index, **self.network.grid
            )
            self._matrix.counts += counts
            if share := self.loss.share(counts.sum(1), len(truth)):
                self._losses += torch.stack([self.loss(some, truth).double() * share, self._losses.new_tensor(share)])

    def on_validation_epoch_end(self) -> None:
        """The scores over the batches of all processes."""
        matrix = self._matrix.total()
        total, share = self.trainer.strategy.reduce(self._losses, reduce_op="sum").tolist()
        if not matrix.any() or not share:
            raise DataError(f"no pixel of the split counts: ignore_index is {self.loss.ignore_index}")
        scores = self._matrix.scores()
        self.evaluation = Evaluation(total / share, scores)
        logged = {"loss": total / share, "mean_iou": scores.mean_iou, "pixel_accuracy": scores.pixel_accuracy}
        self.log_dict({f"val_{name}": value for name, value in logged.items()}, prog_bar=True, sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The masks ``[N, H, W]`` of a batch's images."""
        return self.network.predict(batch[0] if isinstance(batch, (tuple, list)) else batch)

    def configure_optimizers(self) -> Any:
        """The optimizer over what isn't frozen, and the schedule of its learning rate, step by step."""
        parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        options: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay}
        kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
        if self.optimizer == "sgd":
            options["momentum"] = self.momentum
        optimizer = kinds[self.optimizer](parameters, **options)
        if self.schedule == "constant" and not self.warmup:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self._scheduler(optimizer), "interval": "step"},
        }

    def _scheduler(self, optimizer: torch.optim.Optimizer) -> LRScheduler:
        steps = int(self.trainer.estimated_stepping_batches)
        if self.schedule == "onecycle":
            return OneCycleLR(optimizer, self.lr, total_steps=steps)
        first = self.warmup * steps / (self.trainer.max_epochs or 1)

        def factor(step: int) -> float:
            if step < first:
                return (step + 1) / (first + 1)
            done = min(1.0, (step - first) / max(1.0, steps - first))
            return {"constant": 1.0, "poly": (1 - done) ** _POLY_POWER, "cosine": (1 + math.cos(math.pi * done)) / 2}[
                self.schedule
            ]

        return LambdaLR(optimizer, factor)

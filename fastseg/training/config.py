"""The settings of a training run."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Literal, TypeAlias

from fastseg.data import DataConfig
from fastseg.training._records import wrong_field
from fastseg.training.errors import ConfigError

Backend: TypeAlias = Literal["fastseg", "inductor", "eager"]
DeviceChoice: TypeAlias = Literal["auto", "cpu", "cuda"]
LoggerKind: TypeAlias = Literal["csv", "tensorboard", "wandb"]
LossKind: TypeAlias = Literal["ce", "mse", "dice", "ce+dice", "focal"]
OptimizerKind: TypeAlias = Literal["sgd", "adam", "adamw"]
Precision: TypeAlias = Literal["fp32", "bf16", "fp16"]
Schedule: TypeAlias = Literal["constant", "poly", "cosine", "onecycle"]
Weighting: TypeAlias = Literal["none", "inverse", "median"]

MODELS = "fcn, unet, smp:NAME, torchvision:NAME, transformers:NAME or package.module:function"
_MODEL = re.compile(r"fcn|unet|[A-Za-z_][\w.]*:[\w-]+")
_LARGEST_LABEL = 65535  # masks are files of at most 16 bits

# These say where and for how long a run works; all other settings decide what it computes.
_FREE_ON_RESUME = frozenset({"data", "out", "epochs", "resume", "device", "devices", "nodes", "workers", "logger"})


@dataclasses.dataclass(frozen=True)
class TrainConfig(DataConfig):
    """Everything that `fastseg.training.train` needs to know; the command line has an option for each field.

    The fields of `fastseg.data.DataConfig` say what the data are; ``seed`` is also that of the initial weights, the
    order of the images and the augmentation.

    Args:
        model: ``"fcn"`` or ``"unet"`` of `fastseg.models`; ``"smp:Unet"`` and the other networks of
            segmentation_models_pytorch; ``"torchvision:deeplabv3_resnet50"`` and the like;
            ``"transformers:segformer-b0"`` to ``-b5``; or ``"package.module:function"``, a function of ``num_classes``
            and ``in_channels`` that gives a network of images ``[N, in_channels, H, W]`` to logits
            ``[N, num_classes, h, w]``.
        encoder: Encoder of smp's networks; None takes resnet34.
        weights: ``"none"``, ``"pretrained"`` for those of the network's library, or a file: a checkpoint of fastseg, or
            a state_dict that safetensors or torch.save wrote. Tensors of other shapes keep their initial values.
        freeze_encoder: Whether the encoder keeps its weights and its normalisation statistics.
        out: Folder for checkpoints, history and curves; None takes the first free one of ``runs/MODEL``,
            ``runs/MODEL-2``, ...
        size: ``(height, width)`` that images and masks are resized to; None keeps the files', which must then agree.
        epochs: Passes over the training split.
        batch_size: Images of a step, in each process; ``"auto"`` for the largest that memory holds.
        lr: Learning rate; ``"auto"`` for what a range test (Smith, 2017) suggests.
        optimizer: ``"sgd"``, ``"adam"`` or ``"adamw"`` of `torch.optim`.
        momentum: Momentum of SGD; the other optimizers don't use it.
        weight_decay: Weight decay of the optimizer.
        schedule: How the learning rate goes over the run: ``"constant"``, ``"poly"`` ``(1 - t)^0.9``, ``"cosine"``
            ``(1 + cos(pi t)) / 2``, or ``"onecycle"``, `torch.optim.lr_scheduler.OneCycleLR` up to ``lr``.
        warmup: Epochs, or a part of one, over which the learning rate grows linearly from 0; not for ``"onecycle"``.
        accumulate: Batches whose gradients make one step.
        clip: Largest norm of a step's gradient; None for no limit.
        precision: ``"fp32"``, or mixed with ``"bf16"`` or, on a GPU, ``"fp16"``.
        ema: Decay of an exponential moving average of the weights, which is what is evaluated and kept; 0 for none.
        early_stopping: Epochs without a better mean IoU after which the run ends; 0 for never.
        kernel_size: Side of the square kernels of fcn and unet, in pixels.
        widths: Channels of the stages of fcn and unet; None takes the network's own default.
        loss: ``"ce"``: cross-entropy; ``"mse"``: squared error between the softmax and the one-hot truth; ``"dice"``,
            ``"ce+dice"``, ``"focal"``: see `fastseg.functional.cross_entropy_dice` and `fastseg.functional.focal_loss`.
        class_weights: Weights of the classes, by ``"inverse"`` or ``"median"`` frequency, or ``"none"``; for ``"ce"``,
            ``"ce+dice"`` (in the cross-entropy) and ``"focal"``.
        label_smoothing: Label smoothing of the cross-entropy, in [0, 1].
        auxiliary_weight: How much each auxiliary head of the network counts in the training loss.
        hflip: Probability of a horizontal flip, in [0, 1].
        vflip: Probability of a vertical flip, in [0, 1].
        rotation: Largest rotation in degrees, in [0, 180].
        scale: Range of a random scale; what lies outside of a scaled-down image is ignored.
        crop: ``(height, width)`` of a random crop, after the scale; None for the images' size.
        jitter: Strength of random brightness, contrast, saturation and (a fifth of it) hue, in [0, 1].
        resume: Continue the run in ``out``.
        backend: ``"fastseg"``: fastseg's operators, for fcn and unet built in, for others put in by
            ``compile(backend="fastseg")``; ``"inductor"``: plain PyTorch, compiled; ``"eager"``: plain PyTorch.
        device: ``"cpu"``, ``"cuda"``, or ``"auto"`` for CUDA where there is a device.
        devices: Processes on this machine, each on a GPU of its own; torchrun and SLURM say it themselves.
        nodes: Machines; as ``devices``.
        workers: Processes that load images; None takes 4 with CUDA and 0 on a CPU, whose cores are busy training.
        channels_last: Keep images and network in torch's channels_last memory format.
        logger: ``"csv"``, ``"tensorboard"`` or ``"wandb"``: where Lightning logs the run, beside ``history.jsonl``.

    Raises:
        ConfigError: A value has another type or is outside its range, or two contradict each other.
    """

    model: str = "fcn"
    encoder: str | None = None
    weights: str = "none"
    freeze_encoder: bool = False
    out: Path | None = None
    size: tuple[int, int] | None = None
    epochs: int = 20
    batch_size: int | Literal["auto"] = 8
    lr: float | Literal["auto"] = 1e-3
    optimizer: OptimizerKind = "adam"
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Schedule = "constant"
    warmup: float = 0.0
    accumulate: int = 1
    clip: float | None = None
    precision: Precision = "fp32"
    ema: float = 0.0
    early_stopping: int = 0
    kernel_size: int = 3
    widths: tuple[int, ...] | None = None
    loss: LossKind = "ce"
    class_weights: Weighting = "none"
    label_smoothing: float = 0.0
    auxiliary_weight: float = 0.5
    hflip: float = 0.5
    vflip: float = 0.0
    rotation: float = 0.0
    scale: tuple[float, float] | None = None
    crop: tuple[int, int] | None = None
    jitter: float = 0.0
    resume: bool = False
    backend: Backend = "fastseg"
    device: DeviceChoice = "auto"
    devices: int = 1
    nodes: int = 1
    workers: int | None = None
    channels_last: bool = False
    logger: LoggerKind = "csv"

    def __post_init__(self) -> None:
        if problem := wrong_field(self):
            raise ConfigError(problem)
        self._check_numbers()
        self._check_fractions()
        self._check_together()

    def _check_numbers(self) -> None:
        for name, least in (
            ("epochs", 1), ("batch_size", 1), ("kernel_size", 1), ("seed", 0), ("accumulate", 1), ("devices", 1),
            ("nodes", 1), ("early_stopping", 0), ("classes", 1), ("ignore_index", 0), ("workers", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, int) and value < least:
                raise ConfigError(f"{name} must be at least {least}, but it is {value}")
        for name in ("lr", "clip"):
            value = getattr(self, name)
            if isinstance(value, (int, float)) and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} must be positive and finite, but it is {value}")
        if self.ignore_index is not None and self.ignore_index > _LARGEST_LABEL:
            raise ConfigError(f"ignore_index must be at most {_LARGEST_LABEL}, but it is {self.ignore_index}")
        for name in ("size", "crop"):
            value = getattr(self, name)
            if value is not None and min(value) < 1:
                raise ConfigError(f"{name} must be two positive numbers (height, width), but it is {value}")
        if self.widths is not None and (not self.widths or min(self.widths) < 1):
            raise ConfigError(f"widths must be positive numbers, but they are {self.widths}")
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1] < math.inf:
            raise ConfigError(f"scale must be two positive numbers (least, largest), but it is {self.scale}")

    def _check_fractions(self) -> None:
        for name, least, largest in (
            ("momentum", 0.0, 1.0), ("weight_decay", 0.0, math.inf), ("warmup", 0.0, math.inf), ("ema", 0.0, 1.0),
            ("label_smoothing", 0.0, 1.0), ("auxiliary_weight", 0.0, math.inf), ("hflip", 0.0, 1.0),
            ("vflip", 0.0, 1.0), ("rotation", 0.0, 180.0), ("jitter", 0.0, 1.0), ("val_fraction", 0.0, 1.0),
            ("test_fraction", 0.0, 1.0),
        ):  # fmt: skip
            value = getattr(self, name)
            if not least <= value <= largest:
                raise ConfigError(f"{name} must be in [{least:g}, {largest:g}], but it is {value}")
        if self.val_fraction == 0:
            raise ConfigError("val_fraction must be more than 0: the best weights are chosen on the validation split")
        if self.val_fraction + self.test_fraction >= 1:
            raise ConfigError(
                f"val_fraction and test_fraction must leave something to train on, "
                f"but they are {self.val_fraction} and {self.test_fraction}"
            )

    def _check_together(self) -> None:
        if not _MODEL.fullmatch(self.model):
            raise ConfigError(f"model must be {MODELS}, but it is {self.model!r}")
        if self.model == "unet" and self.widths is not None and len(self.widths) < 2:
            raise ConfigError(f"widths must be at least two numbers for unet, but they are {self.widths}")
        if self.encoder is not None and not self.model.startswith("smp:"):
            raise ConfigError(f"encoder is for the networks of smp, but model is {self.model}")
        if self.resume and self.out is None:
            raise ConfigError("resume needs out: the folder of the run to continue")
        for name, unset, losses in (
            ("class_weights", "none", ("mse", "dice")), ("label_smoothing", 0, ("mse", "dice", "focal")),
        ):  # fmt: skip
            if self.loss in losses and getattr(self, name) != unset:
                raise ConfigError(f"{name} must be {unset} with loss {self.loss}, but it is {getattr(self, name)}")
        if self.schedule == "onecycle" and self.warmup:
            raise ConfigError(f"warmup must be 0 with schedule onecycle, but it is {self.warmup}")

    def continuing(self, earlier: TrainConfig) -> TrainConfig:
        """These settings, to continue a run: what was tuned there is taken from there.

        Raises:
            ConfigError: A setting that decides what the run computes is another.
        """
        tuned = {name: getattr(earlier, name) for name in ("batch_size", "lr") if getattr(self, name) == "auto"}
        config = dataclasses.replace(self, **tuned)
        free = _FREE_ON_RESUME if self.schedule == "constant" else _FREE_ON_RESUME - {"epochs"}
        for field in dataclasses.fields(self):
            before, now = getattr(earlier, field.name), getattr(config, field.name)
            if field.name not in free and now != before:
                raise ConfigError(f"{field.name} must be {before} as in the run to continue, but it is {now}")
        return config

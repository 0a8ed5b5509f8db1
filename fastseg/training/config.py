"""The settings of a training run."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from fastseg.data import DataConfig
from fastseg.training.errors import ConfigError

ModelKind: TypeAlias = Literal["fcn", "unet"]
OptimizerKind: TypeAlias = Literal["sgd", "adam", "adamw"]
LossKind: TypeAlias = Literal["ce", "mse"]
Weighting: TypeAlias = Literal["none", "inverse", "median"]
Backend: TypeAlias = Literal["fastseg", "plain"]
DeviceChoice: TypeAlias = Literal["auto", "cpu", "cuda"]

_LARGEST_LABEL = 65535  # masks are files of at most 16 bits

# These say where and for how long a run works; all other settings decide what it computes.
_FREE_ON_RESUME = frozenset({"data", "out", "epochs", "resume", "device", "workers"})


@dataclasses.dataclass(frozen=True)
class TrainConfig(DataConfig):
    """Everything that `fastseg.training.train` needs to know; the command line has an option for each field.

    The fields of `fastseg.data.DataConfig` say what the data are; ``seed`` is also that of the initial weights, the
    order of the images and the augmentation.

    Args:
        model: ``"fcn"`` or ``"unet"`` of `fastseg.models`.
        out: Folder for checkpoints, history and curves; None takes the first free one of ``runs/MODEL``,
            ``runs/MODEL-2``, ...
        size: ``(height, width)`` that images and masks are resized to; None keeps the files', which must then agree.
        epochs: Passes over the training split.
        batch_size: Images of a step, in each process.
        lr: Learning rate.
        optimizer: ``"sgd"``, ``"adam"`` or ``"adamw"`` of `torch.optim`.
        momentum: Momentum of SGD; the other optimizers don't use it.
        weight_decay: Weight decay of the optimizer.
        kernel_size: Side of the network's square kernels, in pixels.
        widths: Channels of the network's stages; None takes the network's own default.
        loss: ``"ce"``: cross-entropy; ``"mse"``: squared error between the softmax and the one-hot truth.
        class_weights: Weights of the classes in ``"ce"``, by ``"inverse"`` or ``"median"`` frequency, or ``"none"``.
        label_smoothing: Label smoothing of ``"ce"``, in [0, 1].
        hflip: Probability of a horizontal flip, in [0, 1].
        vflip: Probability of a vertical flip, in [0, 1].
        rotation: Largest rotation in degrees, in [0, 180].
        resume: Continue the run in ``out``.
        backend: ``"fastseg"``, or ``"plain"`` for the same network in plain PyTorch.
        device: ``"cpu"``, ``"cuda"``, or ``"auto"`` for CUDA where there is a device.
        workers: Processes that load images; None takes 4 with CUDA and 0 on a CPU, whose cores are busy training.
        channels_last: Keep images and network in torch's channels_last memory format.

    Raises:
        ConfigError: A value is outside its range, or two contradict each other.
    """

    model: ModelKind = "fcn"
    out: Path | None = None
    size: tuple[int, int] | None = None
    epochs: int = 20
    batch_size: int = 8
    lr: float = 1e-3
    optimizer: OptimizerKind = "adam"
    momentum: float = 0.9
    weight_decay: float = 0.0
    kernel_size: int = 3
    widths: tuple[int, ...] | None = None
    loss: LossKind = "ce"
    class_weights: Weighting = "none"
    label_smoothing: float = 0.0
    hflip: float = 0.5
    vflip: float = 0.0
    rotation: float = 0.0
    resume: bool = False
    backend: Backend = "fastseg"
    device: DeviceChoice = "auto"
    workers: int | None = None
    channels_last: bool = False

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_integers()
        self._check_fractions()
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ConfigError(f"lr must be positive and finite, but it is {self.lr}")
        if self.resume and self.out is None:
            raise ConfigError("resume needs out: the folder of the run to continue")
        if self.loss == "mse" and self.class_weights != "none":
            raise ConfigError(f"class_weights must be none with loss mse, but it is {self.class_weights}")
        if self.loss == "mse" and self.label_smoothing:
            raise ConfigError(f"label_smoothing must be 0 with loss mse, but it is {self.label_smoothing}")

    def _check_choices(self) -> None:
        for name, kind in (
            ("model", ModelKind),
            ("optimizer", OptimizerKind),
            ("loss", LossKind),
            ("class_weights", Weighting),
            ("backend", Backend),
            ("device", DeviceChoice),
        ):
            if getattr(self, name) not in get_args(kind):
                raise ConfigError(
                    f"{name} must be one of {', '.join(get_args(kind))}, but it is {getattr(self, name)!r}"
                )

    def _check_integers(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 1), ("kernel_size", 1), ("seed", 0)):
            _at_least(name, getattr(self, name), least)
        for name, least in (("classes", 1), ("ignore_index", 0), ("workers", 0)):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), least)
        if self.ignore_index is not None and self.ignore_index > _LARGEST_LABEL:
            raise ConfigError(f"ignore_index must be at most {_LARGEST_LABEL}, but it is {self.ignore_index}")
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise ConfigError(f"size must be two positive numbers (height, width), but it is {self.size}")
        if self.widths is not None and (not self.widths or min(self.widths) < 1):
            raise ConfigError(f"widths must be positive numbers, but they are {self.widths}")
        if self.model == "unet" and self.widths is not None and len(self.widths) < 2:
            raise ConfigError(f"widths must be at least two numbers for unet, but they are {self.widths}")

    def _check_fractions(self) -> None:
        for name, least, largest in (
            ("momentum", 0.0, 1.0),
            ("weight_decay", 0.0, math.inf),
            ("label_smoothing", 0.0, 1.0),
            ("hflip", 0.0, 1.0),
            ("vflip", 0.0, 1.0),
            ("rotation", 0.0, 180.0),
            ("val_fraction", 0.0, 1.0),
            ("test_fraction", 0.0, 1.0),
        ):
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

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON's types, for a checkpoint."""
        return {
            name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> TrainConfig:
        """The settings whose `to_json` is ``fields``.

        Raises:
            ConfigError: A value is outside its range.
            KeyError, TypeError: ``fields`` aren't such settings.
        """
        paths = {name: fields[name] and Path(fields[name]) for name in ("data", "out")}
        tuples = {name: fields[name] and tuple(fields[name]) for name in ("size", "widths")}
        return cls(**{**fields, **paths, **tuples})

    def check_same_run(self, earlier: TrainConfig) -> None:
        """Check that these settings continue a run.

        Raises:
            ConfigError: A setting that decides what the run computes is another.
        """
        for field in dataclasses.fields(self):
            before, now = getattr(earlier, field.name), getattr(self, field.name)
            if field.name not in _FREE_ON_RESUME and now != before:
                raise ConfigError(f"{field.name} must be {before} as in the run to continue, but it is {now}")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name} must be at least {least}, but it is {value}")

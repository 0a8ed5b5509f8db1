"""The options of the commands, and what the shell's text becomes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

from typer import Option

from fastseg.training import ConfigError
from fastseg.training import config as kinds


def parse_size(text: str | None) -> tuple[int, int] | None:
    """``"180x240"`` to ``(180, 240)``."""
    if text is None:
        return None
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise ConfigError(f"size must be HxW, as in 180x240, but it is {text!r}")
    return int(height), int(width)


def parse_widths(text: str | None) -> tuple[int, ...] | None:
    """``"32,64"`` to ``(32, 64)``."""
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"widths must be numbers with commas between them, as in 32,64, but it is {text!r}")
    return tuple(int(part) for part in parts)


_CAMVID_DEFAULT = "11 for CamVid's layout, else {}"
_LAYOUTS = "images/ + masks/ matched by stem, or train/ + trainannot/ and val/ + valannot/"

Data: TypeAlias = Annotated[Path, Option(help=f"Data set: {_LAYOUTS}.")]
Checkpoint: TypeAlias = Annotated[Path, Option(help="Checkpoint that training wrote.")]
Model: TypeAlias = Annotated[kinds.ModelKind, Option(help="Network.")]
RunFolder: TypeAlias = Annotated[
    Path | None, Option(help="Folder of the run.", show_default="the first free one of runs/MODEL, runs/MODEL-2, ...")
]
Size: TypeAlias = Annotated[
    str | None, Option(metavar="HxW", help="Resize to this height x width.", show_default="the files' own")
]
Epochs: TypeAlias = Annotated[int, Option(help="Passes over the training split.")]
BatchSize: TypeAlias = Annotated[int, Option(min=1, help="Images of a batch, in each process.")]
LearningRate: TypeAlias = Annotated[float, Option(help="Learning rate.")]
Optimizer: TypeAlias = Annotated[kinds.OptimizerKind, Option(help="Optimizer.")]
Momentum: TypeAlias = Annotated[float, Option(help="Momentum of sgd.")]
WeightDecay: TypeAlias = Annotated[float, Option(help="Weight decay.")]
KernelSize: TypeAlias = Annotated[int, Option(help="Side of the network's kernels, in pixels.")]
Widths: TypeAlias = Annotated[
    str | None, Option(metavar="N,N,...", help="Channels of the network's stages.", show_default="the network's own")
]
Loss: TypeAlias = Annotated[kinds.LossKind, Option(help="Cross-entropy, or squared error of the softmax.")]
ClassWeights: TypeAlias = Annotated[
    kinds.Weighting, Option(help="Weigh the classes of ce by inverse or median frequency.")
]
LabelSmoothing: TypeAlias = Annotated[float, Option(help="Label smoothing of ce.")]
HorizontalFlip: TypeAlias = Annotated[float, Option(help="Probability of a horizontal flip.")]
VerticalFlip: TypeAlias = Annotated[float, Option(help="Probability of a vertical flip.")]
Rotation: TypeAlias = Annotated[float, Option(help="Largest rotation, in degrees.")]
ValFraction: TypeAlias = Annotated[float, Option(help="Share of images/ that validates.")]
TestFraction: TypeAlias = Annotated[float, Option(help="Share of images/ that is kept for a test.")]
Classes: TypeAlias = Annotated[
    int | None, Option(help="Number of classes.", show_default=_CAMVID_DEFAULT.format("from the masks"))
]
IgnoreIndex: TypeAlias = Annotated[
    int | None, Option(help="Label that doesn't count.", show_default=_CAMVID_DEFAULT.format("255"))
]
Seed: TypeAlias = Annotated[int, Option(help="The same seed gives the same run.")]
Resume: TypeAlias = Annotated[bool, Option("--resume", help="Continue the run in --out.")]
Backend: TypeAlias = Annotated[kinds.Backend, Option(help="fastseg's kernels, or the same network in plain PyTorch.")]
Device: TypeAlias = Annotated[kinds.DeviceChoice, Option(help="auto: CUDA where there is a device.")]
Workers: TypeAlias = Annotated[
    int | None, Option(min=0, help="Processes that load images.", show_default="4 with CUDA, 0 on a CPU")
]
ChannelsLast: TypeAlias = Annotated[bool, Option("--channels-last", help="Use torch's channels_last memory format.")]

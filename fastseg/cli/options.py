"""The options of the commands, and what the shell's text becomes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeAlias

from typer import BadParameter, Option

from fastseg.data import LAYOUTS, DataError, read_label_map
from fastseg.data.labels import ExifChoice, LabelMap
from fastseg.training import ConfigError
from fastseg.training import config as kinds


def parse_size(text: str | None, name: str = "size") -> tuple[int, int] | None:
    """``"180x240"`` to ``(180, 240)``."""
    if text is None:
        return None
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise ConfigError(f"{name} must be HxW, as in 180x240, but it is {text!r}")
    return int(height), int(width)


def parse_number(name: str, text: str, kind: type[int] | type[float]) -> Any:
    """``"8"`` to 8, and ``"auto"`` as it is."""
    if text == "auto":
        return text
    try:
        return kind(text)
    except ValueError as error:
        raise ConfigError(f"{name} must be a number or auto, but it is {text!r}") from error


def parse_range(text: str | None) -> tuple[float, float] | None:
    """``"0.5,2"`` to ``(0.5, 2.0)``."""
    if text is None:
        return None
    least, _, largest = text.partition(",")
    try:
        return float(least), float(largest)
    except ValueError as error:
        raise ConfigError(f"scale must be two numbers, as in 0.5,2, but it is {text!r}") from error


def parse_widths(text: str | None) -> tuple[int, ...] | None:
    """``"32,64"`` to ``(32, 64)``."""
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"widths must be numbers with commas between them, as in 32,64, but it is {text!r}")
    return tuple(int(part) for part in parts)


def parse_label_map(path: str) -> LabelMap:
    """The label map in a file."""
    try:
        return read_label_map(path)
    except DataError as error:
        raise BadParameter(str(error)) from error


_CAMVID_DEFAULT = "11 for CamVid's layout, else {}"

Data: TypeAlias = Annotated[Path, Option(help="Data set: images/ + masks/ matched by stem, or another --layout.")]
Layout: TypeAlias = Annotated[
    str, Option(metavar="NAME", help=f"Layout of the folder: {', '.join(LAYOUTS)}.", show_default="found out")
]
MaskSuffix: TypeAlias = Annotated[
    str | None, Option(metavar="TEXT", help="What a mask's stem has after its image's, as in _mask.")
]
LabelMapFile: TypeAlias = Annotated[
    Any,
    Option(
        metavar="FILE",
        parser=parse_label_map,
        help='JSON of the masks\' numbers or colours to class names: {"0": "ground", "255": "road"}; null: ignored.',
    ),
]
Binary: TypeAlias = Annotated[bool, Option("--binary", help="Masks have 0 for the background; the rest is one class.")]
ReduceLabels: TypeAlias = Annotated[
    bool, Option("--reduce-labels", help="Label 0 of the masks doesn't count; the classes begin with 1.")
]
Exif: TypeAlias = Annotated[
    ExifChoice, Option(help="Turn images as EXIF says, or not, or refuse those whose mask EXIF turns otherwise.")
]
MaxPixels: TypeAlias = Annotated[int | None, Option(min=1, help="Refuse larger images.", show_default="500 million")]
Checkpoint: TypeAlias = Annotated[Path, Option(help="Checkpoint that training wrote.")]
Model: TypeAlias = Annotated[str, Option(help=f"Network: {kinds.MODELS}.")]
Function: TypeAlias = Annotated[
    str | None, Option("--model", help="Network of the checkpoint, where it is the user's package.module:function.")
]
Encoder: TypeAlias = Annotated[str | None, Option(help="Encoder of smp's networks.", show_default="resnet34")]
Weights: TypeAlias = Annotated[str, Option(help="Initial weights: none, pretrained, or a file.")]
FreezeEncoder: TypeAlias = Annotated[bool, Option("--freeze-encoder", help="Keep the encoder's weights.")]
RunFolder: TypeAlias = Annotated[
    Path | None, Option(help="Folder of the run.", show_default="the first free one of runs/MODEL, runs/MODEL-2, ...")
]
Size: TypeAlias = Annotated[
    str | None, Option(metavar="HxW", help="Resize to this height x width.", show_default="the files' own")
]
Epochs: TypeAlias = Annotated[int, Option(help="Passes over the training split.")]
BatchSize: TypeAlias = Annotated[int, Option(min=1, help="Images of a batch, in each process.")]
AutoBatchSize: TypeAlias = Annotated[
    str, Option(help="Images of a batch, in each process; auto for the largest that memory holds.")
]
LearningRate: TypeAlias = Annotated[str, Option(help="Learning rate; auto for what a range test suggests.")]
Schedule: TypeAlias = Annotated[kinds.Schedule, Option(help="How the learning rate goes over the run.")]
Warmup: TypeAlias = Annotated[float, Option(help="Epochs over which the learning rate grows to its value.")]
Accumulate: TypeAlias = Annotated[int, Option(help="Batches whose gradients make one step.")]
Clip: TypeAlias = Annotated[float | None, Option(help="Largest norm of a gradient.", show_default="no limit")]
Precision: TypeAlias = Annotated[kinds.Precision, Option(help="float32, or mixed precision.")]
Ema: TypeAlias = Annotated[float, Option(help="Decay of a moving average of the weights, which is kept; 0: none.")]
EarlyStopping: TypeAlias = Annotated[int, Option(help="End after so many epochs without a better mean IoU; 0: don't.")]
Optimizer: TypeAlias = Annotated[kinds.OptimizerKind, Option(help="Optimizer.")]
Momentum: TypeAlias = Annotated[float, Option(help="Momentum of sgd.")]
WeightDecay: TypeAlias = Annotated[float, Option(help="Weight decay.")]
KernelSize: TypeAlias = Annotated[int, Option(help="Side of the network's kernels, in pixels.")]
Widths: TypeAlias = Annotated[
    str | None, Option(metavar="N,N,...", help="Channels of the network's stages.", show_default="the network's own")
]
Loss: TypeAlias = Annotated[kinds.LossKind, Option(help="mse: squared error of the softmax.")]
ClassWeights: TypeAlias = Annotated[kinds.Weighting, Option(help="Weigh the classes by inverse or median frequency.")]
LabelSmoothing: TypeAlias = Annotated[float, Option(help="Label smoothing of ce.")]
AuxiliaryWeight: TypeAlias = Annotated[float, Option(help="How much each auxiliary head counts in the loss.")]
HorizontalFlip: TypeAlias = Annotated[float, Option(help="Probability of a horizontal flip.")]
VerticalFlip: TypeAlias = Annotated[float, Option(help="Probability of a vertical flip.")]
Rotation: TypeAlias = Annotated[float, Option(help="Largest rotation, in degrees.")]
Scale: TypeAlias = Annotated[
    str | None, Option(metavar="MIN,MAX", help="Range of a random scale.", show_default="none")
]
Crop: TypeAlias = Annotated[
    str | None, Option(metavar="HxW", help="Random crop, padded with the ignored label.", show_default="none")
]
Jitter: TypeAlias = Annotated[float, Option(help="Strength of random changes of the colours, in 0..1.")]
ValFraction: TypeAlias = Annotated[float, Option(help="Share that validates, where the layout has no splits.")]
TestFraction: TypeAlias = Annotated[float, Option(help="Share that is kept for a test, likewise.")]
Classes: TypeAlias = Annotated[
    int | None, Option(help="Number of classes.", show_default=_CAMVID_DEFAULT.format("from the masks"))
]
IgnoreIndex: TypeAlias = Annotated[
    int | None, Option(help="Label that doesn't count.", show_default=_CAMVID_DEFAULT.format("255"))
]
Seed: TypeAlias = Annotated[int, Option(help="The same seed gives the same run.")]
Resume: TypeAlias = Annotated[bool, Option("--resume", help="Continue the run in --out.")]
Backend: TypeAlias = Annotated[
    kinds.Backend, Option(help="fastseg's operators, or plain PyTorch, compiled (inductor) or not (eager).")
]
Device: TypeAlias = Annotated[kinds.DeviceChoice, Option(help="auto: CUDA where there is a device.")]
Devices: TypeAlias = Annotated[int, Option(help="Processes on this machine; torchrun and SLURM say it themselves.")]
Nodes: TypeAlias = Annotated[int, Option(help="Machines; as --devices.")]
Logger: TypeAlias = Annotated[kinds.LoggerKind, Option(help="Where Lightning logs the run, in its folder or at W&B.")]
Workers: TypeAlias = Annotated[
    int | None, Option(min=0, help="Processes that load images.", show_default="4 with CUDA, 0 on a CPU")
]
ChannelsLast: TypeAlias = Annotated[bool, Option("--channels-last", help="Use torch's channels_last memory format.")]

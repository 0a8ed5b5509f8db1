"""``fastseg train``."""

from __future__ import annotations

from pathlib import Path

from fastseg.cli import options
from fastseg.cli.output import class_table, main_console
from fastseg.training import TrainConfig
from fastseg.training import train as run_training
from fastseg.training.session import BEST

_DEFAULT = TrainConfig(data=Path())


def train(
    data: options.Data,
    model: options.Model = _DEFAULT.model,
    out: options.RunFolder = _DEFAULT.out,
    size: options.Size = None,
    epochs: options.Epochs = _DEFAULT.epochs,
    batch_size: options.BatchSize = _DEFAULT.batch_size,
    lr: options.LearningRate = _DEFAULT.lr,
    optimizer: options.Optimizer = _DEFAULT.optimizer,
    momentum: options.Momentum = _DEFAULT.momentum,
    weight_decay: options.WeightDecay = _DEFAULT.weight_decay,
    kernel_size: options.KernelSize = _DEFAULT.kernel_size,
    widths: options.Widths = None,
    loss: options.Loss = _DEFAULT.loss,
    class_weights: options.ClassWeights = _DEFAULT.class_weights,
    label_smoothing: options.LabelSmoothing = _DEFAULT.label_smoothing,
    hflip: options.HorizontalFlip = _DEFAULT.hflip,
    vflip: options.VerticalFlip = _DEFAULT.vflip,
    rotation: options.Rotation = _DEFAULT.rotation,
    layout: options.Layout = _DEFAULT.layout,
    mask_suffix: options.MaskSuffix = _DEFAULT.mask_suffix,
    label_map: options.LabelMapFile = _DEFAULT.label_map,
    binary: options.Binary = _DEFAULT.binary,
    reduce_labels: options.ReduceLabels = _DEFAULT.reduce_labels,
    exif: options.Exif = _DEFAULT.exif,
    max_pixels: options.MaxPixels = _DEFAULT.max_pixels,
    val_fraction: options.ValFraction = _DEFAULT.val_fraction,
    test_fraction: options.TestFraction = _DEFAULT.test_fraction,
    classes: options.Classes = _DEFAULT.classes,
    ignore_index: options.IgnoreIndex = _DEFAULT.ignore_index,
    seed: options.Seed = _DEFAULT.seed,
    resume: options.Resume = _DEFAULT.resume,
    backend: options.Backend = _DEFAULT.backend,
    device: options.Device = _DEFAULT.device,
    workers: options.Workers = _DEFAULT.workers,
    channels_last: options.ChannelsLast = _DEFAULT.channels_last,
) -> None:
    """Train a network; keep the best and the last checkpoint.

    With several processes: torchrun --nproc-per-node=2 -m fastseg train ...
    """
    settings = locals()  # the options are TrainConfig's fields
    settings.update(size=options.parse_size(size), widths=options.parse_widths(widths))
    console = main_console()
    history = run_training(TrainConfig(**settings), console)
    best = history.best
    console.print(class_table(history.class_names, IoU=best.iou))
    seconds = sum(record.seconds for record in history.epochs)
    console.print(
        f"best epoch {best.epoch} of {len(history.epochs)}: pixel accuracy {best.pixel_accuracy:.4f}, "
        f"mean IoU {best.mean_iou:.4f}; training took {seconds:.1f} s with {backend}\n{history.out / BEST}",
        soft_wrap=True,
        highlight=False,
    )

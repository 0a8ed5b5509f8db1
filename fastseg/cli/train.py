"""``fastseg train``."""

from __future__ import annotations

from pathlib import Path

from fastseg import training
from fastseg.cli import options
from fastseg.cli.output import class_table, main_console
from fastseg.training import TrainConfig

_DEFAULT = TrainConfig(data=Path())


def train(
    data: options.Data,
    model: options.Model = _DEFAULT.model,
    encoder: options.Encoder = _DEFAULT.encoder,
    weights: options.Weights = _DEFAULT.weights,
    freeze_encoder: options.FreezeEncoder = _DEFAULT.freeze_encoder,
    out: options.RunFolder = _DEFAULT.out,
    size: options.Size = None,
    epochs: options.Epochs = _DEFAULT.epochs,
    batch_size: options.AutoBatchSize = str(_DEFAULT.batch_size),
    lr: options.LearningRate = str(_DEFAULT.lr),
    optimizer: options.Optimizer = _DEFAULT.optimizer,
    momentum: options.Momentum = _DEFAULT.momentum,
    weight_decay: options.WeightDecay = _DEFAULT.weight_decay,
    schedule: options.Schedule = _DEFAULT.schedule,
    warmup: options.Warmup = _DEFAULT.warmup,
    accumulate: options.Accumulate = _DEFAULT.accumulate,
    clip: options.Clip = _DEFAULT.clip,
    precision: options.Precision = _DEFAULT.precision,
    ema: options.Ema = _DEFAULT.ema,
    early_stopping: options.EarlyStopping = _DEFAULT.early_stopping,
    kernel_size: options.KernelSize = _DEFAULT.kernel_size,
    widths: options.Widths = None,
    loss: options.Loss = _DEFAULT.loss,
    class_weights: options.ClassWeights = _DEFAULT.class_weights,
    label_smoothing: options.LabelSmoothing = _DEFAULT.label_smoothing,
    auxiliary_weight: options.AuxiliaryWeight = _DEFAULT.auxiliary_weight,
    hflip: options.HorizontalFlip = _DEFAULT.hflip,
    vflip: options.VerticalFlip = _DEFAULT.vflip,
    rotation: options.Rotation = _DEFAULT.rotation,
    scale: options.Scale = None,
    crop: options.Crop = None,
    jitter: options.Jitter = _DEFAULT.jitter,
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
    devices: options.Devices = _DEFAULT.devices,
    nodes: options.Nodes = _DEFAULT.nodes,
    workers: options.Workers = _DEFAULT.workers,
    channels_last: options.ChannelsLast = _DEFAULT.channels_last,
    logger: options.Logger = _DEFAULT.logger,
) -> None:
    """Train a network; keep the best and the last checkpoint.

    With several processes: torchrun --nproc-per-node=2 -m fastseg train ...
    """
    settings = locals()  # the options are TrainConfig's fields
    settings.update(
        size=options.parse_size(size), crop=options.parse_size(crop, "crop"), scale=options.parse_range(scale),
        widths=options.parse_widths(widths), lr=options.parse_number("lr", lr, float),
        batch_size=options.parse_number("batch_size", batch_size, int),
    )  # fmt: skip
    console = main_console()
    history = training.train(TrainConfig(**settings), console)
    best = history.best
    console.print(class_table(history.class_names, IoU=best.iou))
    seconds = sum(record.seconds for record in history.epochs)
    best_file = history.out / "best.safetensors"
    console.print(
        f"best epoch {best.epoch} of {len(history.epochs)}: pixel accuracy {best.pixel_accuracy:.4f}, "
        f"mean IoU {best.mean_iou:.4f}; training took {seconds:.1f} s with {backend}\n{best_file}",
        soft_wrap=True,
        highlight=False,
    )

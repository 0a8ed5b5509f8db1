"""A training run from its settings to its files."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastseg.data import Augment, DataError, Normalize, Splits, class_frequencies, class_weights, open_splits
from fastseg.training._lightning import (
    Callback,
    CSVLogger,
    EarlyStopping,
    EMAWeightAveraging,
    Logger,
    RichProgressBar,
    TensorBoardLogger,
    WandbLogger,
    rank_zero_only,
)
from fastseg.training.checkpoint import Metadata, colors_of, load_weights, read_metadata
from fastseg.training.config import TrainConfig
from fastseg.training.datamodule import SegmentationData
from fastseg.training.devices import choose_device, from_first
from fastseg.training.errors import ConfigError
from fastseg.training.history import History
from fastseg.training.networks import Architecture, Network, build, compiled
from fastseg.training.plots import save_history
from fastseg.training.task import SegmentationTask
from fastseg.training.trainer import (
    BEST,
    CURVES,
    LAST,
    PRECISIONS,
    Kept,
    Record,
    deterministic_cudnn,
    interruptible,
    new_trainer,
    quiet_lightning,
)
from fastseg.training.tuning import tune


def train(config: TrainConfig, console: Console | None = None) -> History:
    """Train a network and keep its best weights and what the run needs to continue.

    ``last.ckpt`` is written before the first epoch and after each one, ``best.safetensors`` after each epoch with a new
    highest mean IoU on the validation split, ``history.jsonl`` after each epoch, all atomically, and ``curves.png`` at
    the end; ``logs/`` is the logger's. Whatever ends the run, ``last.ckpt`` is whole and holds the last finished epoch;
    resuming starts the epoch after that from its beginning.

    Every random number of epoch ``e`` follows from the seed, ``e`` and the process's rank: the same settings on the
    same machine give the same weights, in one go or resumed, bit by bit on a CPU with the same number of threads. Seeds
    torch's global generators.

    Under torchrun or SLURM each process trains on its share of the images, rank 0 writes and prints.

    Args:
        config: The settings.
        console: Where progress is shown; None for nowhere.

    Returns:
        What the run measured, and its folder.

    Raises:
        ConfigError: A setting doesn't go with the data or with the run to continue, or ``out`` holds a run already.
        DataError: The data can't be used.
        CheckpointError: The checkpoint to continue from, or a file of weights, can't be used.
        DivergedError: The loss or a weight is not finite; ``last.ckpt`` holds the epoch before.
    """
    main = rank_zero_only.rank in (0, None)  # type: ignore[attr-defined]
    shown = console if console is not None and main else Console(quiet=True)
    out = _run_folder(config, main)
    earlier = read_metadata(out / LAST) if config.resume else None
    if earlier is not None:
        config = config.continuing(earlier.config)
    with quiet_lightning(), deterministic_cudnn(choose_device(config.device)):
        data, metadata = _prepare(config, shown)
        task = _task(config, metadata, shown)
        shown.print(f"run folder: {out}", soft_wrap=True, highlight=False)
        out.mkdir(parents=True, exist_ok=True)
        if "auto" in (config.batch_size, config.lr):
            config = tune(config, task, data, out, shown)
        metadata = dataclasses.replace(metadata, config=config, history=() if earlier is None else earlier.history)
        record = Record(out, metadata, shown)
        try:
            if metadata.epoch < config.epochs:
                with interruptible():
                    new_trainer(
                        config.device, config.devices, config.nodes, **_options(config, out, record, shown)
                    ).fit(task, data, ckpt_path=out / LAST if metadata.epoch else None)  # else the seed starts it again
        except KeyboardInterrupt:
            shown.print(
                f"{out / LAST} holds epoch {record.metadata.epoch}: resume continues from there", soft_wrap=True
            )
            raise
        finally:
            if main and record.metadata.history:
                save_history(record.metadata.history, out / CURVES)
    return History(out, metadata.class_names, record.metadata.history)


def _options(config: TrainConfig, out: Path, record: Callback, console: Console) -> dict[str, Any]:
    """What a run's settings say of its Trainer."""
    if config.precision == "fp16" and choose_device(config.device).type == "cpu":
        raise ConfigError("precision must be fp32 or bf16 on a CPU, but it is fp16")
    callbacks: list[Callback] = [record]
    if console.is_terminal:
        callbacks.append(RichProgressBar())
    if config.ema:
        callbacks.append(EMAWeightAveraging(decay=config.ema))
    if config.early_stopping:
        callbacks.append(EarlyStopping("val_mean_iou", mode="max", patience=config.early_stopping))
    callbacks += [  # the best first: a run that ends in between does the epoch again, and finds it again
        Kept(out / BEST, monitor="val_mean_iou", mode="max"),
        Kept(out / LAST),
    ]
    return {
        "max_epochs": config.epochs, "callbacks": callbacks, "logger": _logger(config, out),
        "precision": PRECISIONS[config.precision], "accumulate_grad_batches": config.accumulate,
        "gradient_clip_val": config.clip, "enable_progress_bar": console.is_terminal, "enable_checkpointing": True,
        "log_every_n_steps": 10,
    }  # fmt: skip


def _logger(config: TrainConfig, out: Path) -> Logger:
    try:
        if config.logger == "tensorboard":
            return TensorBoardLogger(out, name="logs")
        if config.logger == "wandb":
            return WandbLogger(name=out.name, save_dir=out)
    except ModuleNotFoundError as error:
        raise ConfigError(f"logger {config.logger} needs a package: {' '.join(str(error).split())}") from error
    return CSVLogger(out, name="logs")


def _run_folder(config: TrainConfig, main: bool) -> Path:
    """The run's folder, which need not exist yet; only the first process's answer counts, as it alone writes."""
    if config.out is None:
        model = re.sub(r"\W+", "-", config.model)
        names = itertools.chain([model], (f"{model}-{number}" for number in itertools.count(2)))
        return next(path for name in names if not (path := Path("runs", name)).exists())
    if not config.resume and main and (config.out / LAST).exists():
        raise ConfigError(f"out must be a new folder, but {config.out} holds a run: resume continues it")
    return config.out


def _prepare(config: TrainConfig, console: Console) -> tuple[SegmentationData, Metadata]:
    splits = open_splits(config, config.size, console, from_first(config.survey))
    channels, height, width = splits.train[0][0].shape
    if channels != 3 and config.jitter:
        raise ConfigError(f"jitter must be 0 for images of {channels} channels, but it is {config.jitter}")
    metadata = _describe(config, splits, channels)
    smallest = metadata.network.smallest_side
    for name, extent in (("size", (height, width)), ("crop", config.crop)):
        if extent is not None and min(extent) < smallest:
            raise ConfigError(
                f"{name} must be at least {smallest}x{smallest} for these widths, but it is {extent[0]}x{extent[1]}"
            )
    augment = Augment(
        hflip=config.hflip, vflip=config.vflip, rotation=config.rotation, scale=config.scale, crop=config.crop,
        jitter=config.jitter, ignore_index=splits.ignore_index,
    )  # fmt: skip
    data = SegmentationData(
        splits.train, splits.val, batch_size=1 if config.batch_size == "auto" else config.batch_size,
        workers=config.workers, augment=augment, normalize=Normalize(metadata.mean, metadata.std), seed=config.seed,
        channels_last=config.channels_last,
    )  # fmt: skip
    return data, metadata


def _describe(config: TrainConfig, splits: Splits, channels: int) -> Metadata:
    classes = len(splits.class_names)
    mean, std = splits.summary.normalization
    return Metadata(
        network=Architecture(config.model, classes, channels, config.encoder, config.widths, config.kernel_size),
        class_names=splits.class_names,
        palette=colors_of(splits.summary.palette(classes)),
        ignore_index=splits.ignore_index,
        mean=tuple(mean),
        std=tuple(std),
        size=config.size,
        class_weights=_class_weights(config, splits),
        config=config,
    )


def _class_weights(config: TrainConfig, splits: Splits) -> tuple[float, ...] | None:
    """The weight of each class in the loss, by its frequency in the training split; None for equal weights."""
    if config.class_weights == "none":
        return None
    labels = [facts.labels for facts in splits.summary.splits["train"].values()]
    pixels, present = class_frequencies(labels, len(splits.class_names), splits.ignore_index)
    if not pixels.any():
        raise DataError(f"no pixel of the training split counts: ignore_index is {splits.ignore_index}")
    return tuple(class_weights(pixels, present, config.class_weights).tolist())


def _task(config: TrainConfig, metadata: Metadata, console: Console) -> SegmentationTask:
    torch.manual_seed(config.seed)  # the initial weights
    network = build(metadata.network, config.backend, pretrained=config.weights == "pretrained")
    if config.weights not in ("none", "pretrained"):
        fitting, wanted = load_weights(Path(config.weights), network)
        console.print(f"weights: {fitting} of the network's {wanted} tensors from {config.weights}", soft_wrap=True)
    if config.freeze_encoder:
        network.freeze_encoder()
    if config.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack this one
    # Static shapes: which of two graphs served a batch would else depend on what a run has seen before.
    compiled(network, metadata.network, config.backend, dynamic=False)
    return task_of(metadata, network)


def task_of(metadata: Metadata, network: Network) -> SegmentationTask:
    """The task of a network that its metadata describes."""
    config = metadata.config
    return SegmentationTask(
        network, loss=config.loss, ignore_index=metadata.ignore_index, class_weights=metadata.class_weights,
        label_smoothing=config.label_smoothing, auxiliary_weight=config.auxiliary_weight, optimizer=config.optimizer,
        lr=1e-3 if config.lr == "auto" else config.lr, momentum=config.momentum, weight_decay=config.weight_decay,
        schedule=config.schedule, warmup=config.warmup,
    )  # fmt: skip

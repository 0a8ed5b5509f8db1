"""A training run from its settings to its files: what `SegmentationTask` and Lightning's Trainer need around them."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
import os
import re
import resource
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from rich.console import Console

from fastseg._native import logger
from fastseg.data import Augment, Normalize, Splits, open_splits
from fastseg.training._lightning import (
    Callback,
    CheckpointIO,
    CSVLogger,
    EarlyStopping,
    EMAWeightAveraging,
    LightningModule,
    Logger,
    ModelCheckpoint,
    RichProgressBar,
    TensorBoardLogger,
    Trainer,
    Tuner,
    WandbLogger,
    rank_zero_only,
)
from fastseg.training.checkpoint import (
    HEADER_KEY,
    Metadata,
    colors_of,
    load_weights,
    read_metadata,
    read_state,
    weights_of,
    write_atomically,
    write_state,
    write_weights,
)
from fastseg.training.config import DeviceChoice, TrainConfig
from fastseg.training.datamodule import SegmentationData
from fastseg.training.devices import choose_device
from fastseg.training.errors import ConfigError, DivergedError
from fastseg.training.history import EpochRecord, History, known, to_lines
from fastseg.training.networks import Architecture, Network, build, compiled
from fastseg.training.plots import save_history
from fastseg.training.splits import count_weights
from fastseg.training.task import SegmentationTask

LAST, BEST, HISTORY, CURVES, LR_FIND = "last.ckpt", "best.safetensors", "history.jsonl", "curves.png", "lr_find.png"

_PRECISIONS: dict[str, Any] = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
_LR_STEPS = 100  # of the range test: Lightning's default


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
    with quiet_lightning(), _deterministic_cudnn(choose_device(config.device)):
        data, metadata = _prepare(config, shown)
        task = _task(config, metadata, shown)
        shown.print(f"run folder: {out}", soft_wrap=True, highlight=False)
        out.mkdir(parents=True, exist_ok=True)
        if "auto" in (config.batch_size, config.lr):
            config = _tune(config, task, data, out, shown)
        metadata = dataclasses.replace(metadata, config=config, history=() if earlier is None else earlier.history)
        record = _Record(out, metadata, shown)
        try:
            if metadata.epoch < config.epochs:
                with _interruptible():
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


def new_trainer(device: DeviceChoice, devices: int = 1, nodes: int = 1, **options: Any) -> Trainer:
    """Lightning's Trainer on the processes that torchrun or SLURM started, or on so many of its own.

    Raises:
        ConfigError: There is no such device.
    """
    if dist.is_available() and dist.is_torchelastic_launched():
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    return Trainer(
        accelerator="gpu" if choose_device(device).type == "cuda" else "cpu", devices=devices, num_nodes=nodes,
        strategy="ddp" if devices * nodes > 1 else "auto", plugins=[_Files()], use_distributed_sampler=False,
        num_sanity_val_steps=0, enable_model_summary=False, benchmark=False,
        **{"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, **options},
    )  # fmt: skip


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
        _Kept(out / BEST, monitor="val_mean_iou", mode="max"),
        _Kept(out / LAST),
    ]
    return {
        "max_epochs": config.epochs, "callbacks": callbacks, "logger": _logger(config, out),
        "precision": _PRECISIONS[config.precision], "accumulate_grad_batches": config.accumulate,
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
    splits = open_splits(config, config.size, console)
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
        class_weights=count_weights(config, splits),
        config=config,
    )


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


def _tune(
    config: TrainConfig, task: SegmentationTask, data: SegmentationData, out: Path, console: Console
) -> TrainConfig:
    """The settings with what Lightning's Tuner chose; task and data have it, too, and the initial weights again."""
    if config.devices * config.nodes > 1 or (dist.is_available() and dist.is_torchelastic_launched()):
        raise ConfigError("lr and batch_size can't be auto with several processes: tune them with one")
    task.raises_diverged = False
    if config.batch_size == "auto":
        with _limited_memory():
            Tuner(_tuning_trainer(config, out)).scale_batch_size(task, datamodule=data, max_val=len(data.train))  # type: ignore[arg-type]
        config = dataclasses.replace(config, batch_size=data.batch_size)
        console.print(f"batch size: {data.batch_size} is the largest that fits")
    if config.lr == "auto":
        torch.manual_seed(config.seed)
        finder = Tuner(_tuning_trainer(config, out)).lr_find(task, datamodule=data, num_training=_LR_STEPS)
        lr = None if finder is None else finder.suggestion()
        if finder is None or lr is None:
            raise ConfigError("lr can't be auto here: no step of the range test lowered the loss")
        figure = Figure(layout="constrained")
        finder.plot(suggest=True, ax=figure.subplots())
        figure.savefig(out / LR_FIND)
        config = dataclasses.replace(config, lr=lr)
        console.print(f"learning rate: {lr:.3g} by the range test in {out / LR_FIND}", soft_wrap=True, highlight=False)
    task.raises_diverged = True
    return config


def _tuning_trainer(config: TrainConfig, out: Path) -> Trainer:
    return new_trainer(
        config.device, default_root_dir=out, max_epochs=max(config.epochs, _LR_STEPS), limit_val_batches=0,
        precision=_PRECISIONS[config.precision],
    )  # fmt: skip


class _Files(CheckpointIO):
    """Lightning's files as `fastseg.training.checkpoint` writes and reads them."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        if path.suffix == ".safetensors":
            write_weights(path, weights_of(checkpoint), checkpoint[HEADER_KEY])
        else:
            write_state(path, checkpoint)

    def load_checkpoint(self, path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        return read_state(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


class _Kept(ModelCheckpoint):
    """A file of the run's folder, which may have moved since."""

    def __init__(self, path: Path, **options: Any) -> None:
        super().__init__(
            path.parent, path.stem, save_on_train_epoch_end=True, enable_version_counter=False, **options
        )  # fmt: skip
        self.FILE_EXTENSION = path.suffix

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        here = str(Path(str(self.dirpath), f"{self.filename}{self.FILE_EXTENSION}"))
        paths = {name: here for name in ("best_model_path", "kth_best_model_path") if state_dict[name]}
        models = dict.fromkeys([here] if state_dict["best_k_models"] else [], state_dict["best_model_score"])
        super().load_state_dict({**state_dict, **paths, "dirpath": self.dirpath, "best_k_models": models})


class _Record(Callback):
    """Seeds each epoch, measures it, and puts what it measured into the checkpoints."""

    def __init__(self, out: Path, metadata: Metadata, console: Console) -> None:
        self.out, self.metadata, self.console = out, metadata, console
        self._start = self._seconds = 0.0
        self._line = ""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[HEADER_KEY] = self.metadata.to_json()
        # Whole epochs alone are kept, at their end; Lightning counts one as completed a moment later, and would take it
        # up again without calling on_train_epoch_start.
        for count in ("total", "current"):
            progress = checkpoint["loops"]["fit_loop"]["epoch_progress"][count]
            progress["completed"] = progress["processed"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.metadata.history:
            trainer.save_checkpoint(self.out / LAST)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._print()
        # A seed for each epoch of each process, so that nothing of a generator's state needs to be kept.
        place = self.metadata.config.seed, trainer.current_epoch + 1, trainer.global_rank
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))
        self._start = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seconds = time.perf_counter() - self._start

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, SegmentationTask)
        epoch, (loss, scores) = trainer.current_epoch + 1, pl_module.evaluation
        # The last step's weights have no loss of their own, and not every weight that isn't finite shows in one.
        finite = all(parameter.isfinite().all() for parameter in pl_module.parameters())
        if not (finite and math.isfinite(loss)):
            what = "the validation loss is" if finite else "weights are"
            raise DivergedError(f"epoch {epoch}: {what} not finite; a lower lr helps")
        images = len(trainer.datamodule.train_dataloader().sampler) * trainer.world_size  # type: ignore[attr-defined]
        record = EpochRecord(
            epoch=epoch, train_loss=trainer.callback_metrics["train_loss"].item(), val_loss=loss,
            pixel_accuracy=scores.pixel_accuracy, mean_iou=scores.mean_iou, iou=tuple(map(known, scores.iou)),
            seconds=self._seconds, images_per_second=images / self._seconds,
        )  # fmt: skip
        self.metadata = dataclasses.replace(self.metadata, history=(*self.metadata.history, record))
        if trainer.is_global_zero:
            write_atomically(self.out / HISTORY, to_lines(self.metadata.history).encode())
        self._line = (
            f"epoch {epoch}/{trainer.max_epochs}: train loss {record.train_loss:.4f}, val loss {loss:.4f}, "
            f"pixel accuracy {record.pixel_accuracy:.4f}, mean IoU {record.mean_iou:.4f}, "
            f"{record.seconds:.1f} s, {record.images_per_second:.1f} images/s"
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._print()

    def _print(self) -> None:
        """Say what the last epoch measured, once its checkpoints are written."""
        if self._line:
            self.console.print(self._line, soft_wrap=True, highlight=False)
        self._line = ""


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C as everywhere else, where Lightning ends the process with code 1; what torch means by its own message."""
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise
    except ValueError as error:
        if "more than 1 value per channel" in str(error):
            raise ConfigError("batch_size: batch normalisation in this network needs several images a batch") from error
        raise


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Without Lightning's tips, and without its warnings of what is meant here."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(max(one.level, logging.WARNING))
    try:
        with warnings.catch_warnings():
            for message in (
                ".*does not have many workers",  # a CPU's cores are busy training
                ".*number of training batches .* is smaller than the logging interval",
                "Checkpoint directory .* exists and is not empty",  # that of the run that is resumed, or a new folder
                "GPU available but not used",
                r"Found \d+ module\(s\) in eval mode at the start of training",  # a frozen encoder
                r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning 2.6 does it, torch 2.13 says it
            ):
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)


@contextlib.contextmanager
def _limited_memory() -> Iterator[None]:
    """No more memory for the process than the machine has: where there is none left, an allocation fails."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        text = Path("/proc/meminfo").read_text() + Path("/proc/self/status").read_text()
    except FileNotFoundError:
        logger.info("no /proc: the largest batch is looked for without a limit of memory")
        yield
        return
    available, used = (int(re.search(rf"{name}:\s+(\d+) kB", text)[1]) * 1024 for name in ("MemAvailable", "VmData"))  # type: ignore[index]
    resource.setrlimit(resource.RLIMIT_DATA, (used + available, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


@contextlib.contextmanager
def _deterministic_cudnn(device: torch.device) -> Iterator[None]:
    """Take cuDNN's deterministic algorithms, so that a seed reproduces a run; the caller's choice is restored."""
    if device.type != "cuda":  # there is no cuDNN to set, and who has frozen torch's flags needs none
        yield
        return
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before

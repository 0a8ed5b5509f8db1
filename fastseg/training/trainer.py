"""Lightning's Trainer for a run: its processes and files, and what happens around its epochs."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console

from fastseg.training._lightning import Callback, CheckpointIO, LightningModule, ModelCheckpoint, Trainer
from fastseg.training.checkpoint import (
    HEADER_KEY,
    Metadata,
    read_state,
    weights_of,
    write_atomically,
    write_state,
    write_weights,
)
from fastseg.training.config import DeviceChoice
from fastseg.training.devices import choose_device
from fastseg.training.errors import ConfigError, DivergedError
from fastseg.training.history import EpochRecord, known, to_lines
from fastseg.training.task import SegmentationTask

LAST, BEST, HISTORY, CURVES = "last.ckpt", "best.safetensors", "history.jsonl", "curves.png"
PRECISIONS: dict[str, Any] = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


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
        strategy="ddp" if devices * nodes > 1 else "auto", plugins=[Files()], use_distributed_sampler=False,
        num_sanity_val_steps=0, enable_model_summary=False,
        **{"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, **options},
    )  # fmt: skip


class Files(CheckpointIO):
    """Lightning's files as `fastseg.training.checkpoint` writes and reads them."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write what Lightning keeps, or of it the network for use."""
        path = Path(path)
        if path.suffix == ".safetensors":
            write_weights(path, weights_of(checkpoint), checkpoint[HEADER_KEY])
        else:
            write_state(path, checkpoint)

    def load_checkpoint(self, path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        """Read what Lightning keeps, executing nothing."""
        return read_state(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a file."""
        Path(path).unlink(missing_ok=True)


class Kept(ModelCheckpoint):
    """A file of the run's folder, which may have moved since."""

    def __init__(self, path: Path, **options: Any) -> None:
        super().__init__(
            path.parent, path.stem, save_on_train_epoch_end=True, enable_version_counter=False, **options
        )  # fmt: skip
        self.FILE_EXTENSION = path.suffix

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the best score, for the file where it is now."""
        here = str(Path(str(self.dirpath), f"{self.filename}{self.FILE_EXTENSION}"))
        paths = {name: here for name in ("best_model_path", "kth_best_model_path") if state_dict[name]}
        models = dict.fromkeys([here] if state_dict["best_k_models"] else [], state_dict["best_model_score"])
        super().load_state_dict({**state_dict, **paths, "dirpath": self.dirpath, "best_k_models": models})


class Record(Callback):
    """Seeds each epoch, measures it, and puts what it measured into the checkpoints."""

    def __init__(self, out: Path, metadata: Metadata, console: Console) -> None:
        self.out, self.metadata, self.console = out, metadata, console
        self._start = self._seconds = 0.0
        self._line = ""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the metadata, with the epochs so far."""
        checkpoint[HEADER_KEY] = self.metadata.to_json()
        # Whole epochs alone are kept, at their end; Lightning counts one as completed a moment later, and would take it
        # up again without calling on_train_epoch_start.
        for count in ("total", "current"):
            progress = checkpoint["loops"]["fit_loop"]["epoch_progress"][count]
            progress["completed"] = progress["processed"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the initial weights."""
        if not self.metadata.history:
            trainer.save_checkpoint(self.out / LAST)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed the epoch."""
        self._print()
        # A seed for each epoch of each process, so that nothing of a generator's state needs to be kept.
        place = self.metadata.config.seed, trainer.current_epoch + 1, trainer.global_rank
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))
        self._start = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._seconds = time.perf_counter() - self._start

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the epoch, before the checkpoints are written."""
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
        """Say what the last epoch measured."""
        self._print()

    def _print(self) -> None:
        """Say what the last epoch measured, once its checkpoints are written."""
        if self._line:
            self.console.print(self._line, soft_wrap=True, highlight=False)
        self._line = ""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
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
def deterministic_cudnn(device: torch.device) -> Iterator[None]:
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

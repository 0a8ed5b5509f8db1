"""A training run from its first to its last epoch."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator

import numpy as np
import torch
from rich.console import Console

from fastseg.training.checkpoint import Metadata, save_checkpoint, write_atomically
from fastseg.training.config import TrainConfig
from fastseg.training.distributed import World, join_world
from fastseg.training.engine import Evaluation, evaluate_batches, train_epoch
from fastseg.training.errors import DivergedError
from fastseg.training.history import EpochRecord, History, known, to_lines
from fastseg.training.plots import save_history
from fastseg.training.progress import RunProgress
from fastseg.training.session import BEST, CURVES, HISTORY, LAST, Session, open_session


def train(config: TrainConfig, console: Console | None = None) -> History:
    """Train a network and keep its best and its last checkpoint.

    ``last.safetensors`` is written before the first epoch and after each one, ``best.safetensors`` after each epoch
    with a new highest mean IoU on the validation split, ``history.jsonl`` after each epoch, all atomically, and
    ``curves.png`` at the end. Whatever ends the run, ``last.safetensors`` is whole and holds the last finished epoch;
    resuming starts the epoch after that from its beginning.

    Every random number of epoch ``e`` follows from the seed, ``e`` and the process's rank: the same settings on the
    same machine give the same weights, in one go or resumed, bit by bit on a CPU with the same number of threads. Seeds
    torch's global generators.

    Under torchrun each process trains on its share of the images, rank 0 writes and prints.

    Args:
        config: The settings.
        console: Where progress is shown; None for nowhere.

    Returns:
        What the run measured, and its folder.

    Raises:
        ConfigError: A setting doesn't go with the data or with the run to continue, or ``out`` holds a run already.
        DataError: The data can't be used.
        CheckpointError: The checkpoint to continue from can't be used.
        DivergedError: The loss or a weight is not finite; ``last.safetensors`` holds the epoch before.
    """
    with join_world(config.device) as world, _deterministic_cudnn(world.device):
        shown = console if console is not None and world.is_main else Console(quiet=True)
        session = open_session(config, world, shown)
        shown.print(f"run folder: {session.out}", soft_wrap=True, highlight=False)
        if world.is_main and not config.resume:
            session.out.mkdir(parents=True, exist_ok=True)
            _save_last(session, session.metadata)
        images = len(session.train_order) * world.size
        with RunProgress(shown, images, session.metadata.epoch, config.epochs) as progress:
            metadata = session.metadata
            try:
                for epoch in range(metadata.epoch + 1, config.epochs + 1):
                    record = _run_epoch(session, config.seed, epoch, world, progress)
                    metadata = _keep(session, metadata, record, world)
                    progress.epoch_done(record)
            except KeyboardInterrupt:
                progress.line(f"{session.out / LAST} holds epoch {metadata.epoch}: resume continues from there")
                raise
            finally:
                if world.is_main and metadata.history:
                    save_history(metadata.history, session.out / CURVES)
        return History(session.out, metadata.class_names, metadata.history)


def _run_epoch(session: Session, seed: int, epoch: int, world: World, progress: RunProgress) -> EpochRecord:
    torch.manual_seed(_epoch_seed(seed, epoch, world.rank))
    session.train_order.set_epoch(epoch)
    progress.epoch_started(epoch)
    start = time.perf_counter()
    try:
        train_loss = train_epoch(
            session.parallel,
            session.train_batches,
            session.prepare_train,
            session.optimizer,
            world,
            progress.step_done,
        )
    except DivergedError as error:
        raise DivergedError(f"epoch {epoch}: {error}") from error
    seconds = time.perf_counter() - start
    evaluation = evaluate_batches(session.network, session.val_batches, session.prepare_val, world)
    _check_finite(session, epoch, evaluation)
    return EpochRecord(
        epoch=epoch,
        train_loss=train_loss,
        val_loss=evaluation.loss,
        pixel_accuracy=evaluation.scores.pixel_accuracy,
        mean_iou=evaluation.scores.mean_iou,
        iou=tuple(known(value) for value in evaluation.scores.iou),
        seconds=seconds,
        images_per_second=len(session.train_order) * world.size / seconds,
    )


def _keep(session: Session, metadata: Metadata, record: EpochRecord, world: World) -> Metadata:
    """Write the checkpoints of an epoch; the result is the metadata with its record."""
    improved = all(record.mean_iou > earlier.mean_iou for earlier in metadata.history)
    metadata = dataclasses.replace(metadata, history=(*metadata.history, record))
    if world.is_main:
        if improved:
            save_checkpoint(session.out / BEST, session.network.model, metadata)
        _save_last(session, metadata)
    return metadata


def _epoch_seed(seed: int, epoch: int, rank: int) -> int:
    """A seed for each epoch of each process, so that nothing of a generator's state needs to be kept."""
    return int(np.random.SeedSequence((seed, epoch, rank)).generate_state(1)[0])


def _check_finite(session: Session, epoch: int, evaluation: Evaluation) -> None:
    """The last step's weights have no loss of their own, and not every weight that isn't finite shows in one."""
    finite = all(parameter.isfinite().all() for parameter in session.network.parameters())
    if not (finite and math.isfinite(evaluation.loss)):
        what = "the validation loss is" if finite else "weights are"
        raise DivergedError(f"epoch {epoch}: {what} not finite; a lower lr helps")


def _save_last(session: Session, metadata: Metadata) -> None:
    save_checkpoint(session.out / LAST, session.network.model, metadata, session.optimizer)
    write_atomically(session.out / HISTORY, to_lines(metadata.history).encode())


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

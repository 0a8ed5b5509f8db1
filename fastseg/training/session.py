"""Everything that a run works with, built from its settings."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from fastseg.data import IMAGENET_MEAN, IMAGENET_STD, Augment, Normalize, Splits, open_splits
from fastseg.training.batches import Example, Preparation, make_loader
from fastseg.training.checkpoint import Metadata, load_training_state, read_metadata
from fastseg.training.config import TrainConfig
from fastseg.training.distributed import World
from fastseg.training.engine import NetworkWithLoss, with_loss
from fastseg.training.errors import ConfigError
from fastseg.training.networks import complete_arguments, new_network, smallest_side
from fastseg.training.splits import count_weights

LAST, BEST, HISTORY, CURVES = "last.safetensors", "best.safetensors", "history.jsonl", "curves.png"


@dataclasses.dataclass(frozen=True)
class Session:
    """What a run works with.

    Args:
        out: The run's folder.
        metadata: What the run's checkpoints say; the history of a resumed run is in it.
        network: The network and its loss.
        parallel: ``network``, in DistributedDataParallel where there are several processes.
        optimizer: Over the network's parameters.
        train_order: The order of the training images, by epoch.
        train_batches: The training split.
        val_batches: This process's part of the validation split.
        prepare_train: Preparation of training batches.
        prepare_val: Preparation of validation batches.
    """

    out: Path
    metadata: Metadata
    network: NetworkWithLoss
    parallel: nn.Module
    optimizer: torch.optim.Optimizer
    train_order: DistributedSampler[Example]
    train_batches: DataLoader[Example]
    val_batches: DataLoader[Example]
    prepare_train: Preparation
    prepare_val: Preparation


def open_session(config: TrainConfig, world: World, console: Console | None = None) -> Session:
    """Build a run from its settings, or the continuation of one; ``console`` shows what is in the data.

    Raises:
        ConfigError: A setting doesn't go with the data or with the run to continue, or ``out`` holds a run already.
        DataError: The data can't be used.
        CheckpointError: The checkpoint to continue from can't be used.
    """
    out = _run_folder(config, world)
    if config.resume:
        config.check_same_run(read_metadata(out / LAST).config)
    splits = open_splits(config, config.size, console)
    metadata = _describe(config, splits)
    _check_image_size(metadata, splits.train[0][0])
    prepare = Preparation(world.device, Normalize().to(world.device), channels_last=config.channels_last)
    augment = Augment(
        hflip=config.hflip, vflip=config.vflip, rotation=config.rotation, ignore_index=splits.ignore_index
    )
    torch.manual_seed(config.seed)  # the initial weights
    model = new_network(config.model, config.backend, metadata.arguments)
    model.to(memory_format=prepare.memory_format)  # type: ignore[call-overload]  # torch's stubs lack this one
    network = with_loss(model, metadata).to(world.device)
    optimizer = _optimizer(config, model)
    if config.resume:
        history = load_training_state(out / LAST, model, optimizer).history
        metadata = dataclasses.replace(metadata, history=history)
    order: DistributedSampler[Example] = DistributedSampler(
        splits.train, world.size, world.rank, shuffle=True, seed=config.seed
    )
    part = range(world.rank, len(splits.val), world.size)  # no padding: every image counts once
    return Session(
        out=out,
        metadata=metadata,
        network=network,
        parallel=_parallel(network, world),
        optimizer=optimizer,
        train_order=order,
        train_batches=make_loader(splits.train, config.batch_size, order, world.device, config.workers),
        val_batches=make_loader(splits.val, config.batch_size, part, world.device, config.workers),
        prepare_train=dataclasses.replace(prepare, augment=augment),
        prepare_val=prepare,
    )


def _run_folder(config: TrainConfig, world: World) -> Path:
    """The run's folder, which need not exist yet; only the first process's answer counts, as it alone writes."""
    if config.out is None:
        names = itertools.chain([config.model], (f"{config.model}-{number}" for number in itertools.count(2)))
        return next(path for name in names if not (path := Path("runs", name)).exists())
    if not config.resume and world.is_main and (config.out / LAST).exists():
        raise ConfigError(f"out must be a new folder, but {config.out} holds a run: resume continues it")
    return config.out


def _describe(config: TrainConfig, splits: Splits) -> Metadata:
    arguments = complete_arguments(
        config.model, num_classes=len(splits.class_names), widths=config.widths, kernel_size=config.kernel_size
    )
    return Metadata(
        model=config.model,
        arguments=arguments,
        class_names=splits.class_names,
        ignore_index=splits.ignore_index,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        size=config.size,
        class_weights=count_weights(config, splits),
        config=config,
    )


def _check_image_size(metadata: Metadata, image: Tensor) -> None:
    height, width = image.shape[-2:]
    smallest = smallest_side(metadata.model, metadata.arguments)
    if min(height, width) < smallest:
        raise ConfigError(f"size must be at least {smallest}x{smallest} for these widths, but it is {height}x{width}")


def _optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    match config.optimizer:
        case "sgd":
            return torch.optim.SGD(parameters, config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
        case "adam":
            return torch.optim.Adam(parameters, config.lr, weight_decay=config.weight_decay)
        case "adamw":
            return torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay)


def _parallel(network: NetworkWithLoss, world: World) -> nn.Module:
    if world.size == 1:
        return network
    devices = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(network, device_ids=devices, broadcast_buffers=False)  # no buffer ever changes

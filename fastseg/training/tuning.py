"""The learning rate and the batch size that Lightning's Tuner chooses."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from rich.console import Console

from fastseg._native import logger
from fastseg.training._lightning import Trainer, Tuner
from fastseg.training.config import TrainConfig
from fastseg.training.datamodule import SegmentationData
from fastseg.training.errors import ConfigError
from fastseg.training.task import SegmentationTask
from fastseg.training.trainer import PRECISIONS, new_trainer

LR_FIND = "lr_find.png"

_LR_STEPS = 100  # of the range test: Lightning's default, over eight decades
_LR_SMOOTHING = 4  # steps, a third of a decade: standard deviation of the weights by which its losses are averaged


def tune(
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
        losses: list[float] = []
        task.on_train_batch_end = lambda outputs, *_: losses.append(float(outputs["loss"]))  # type: ignore[method-assign]
        finder = Tuner(_tuning_trainer(config, out)).lr_find(task, datamodule=data, num_training=_LR_STEPS)
        del task.on_train_batch_end
        assert finder is not None
        lr = steepest_descent(finder.results["lr"], losses, out / LR_FIND)
        config = dataclasses.replace(config, lr=lr)
        console.print(f"learning rate: {lr:.3g} by the range test in {out / LR_FIND}", soft_wrap=True, highlight=False)
    task.raises_diverged = True
    return config


def steepest_descent(rates: Sequence[float], losses: Sequence[float], picture: Path) -> float:
    """The learning rate at which the loss falls fastest over the logarithm of the rate, shown in a picture.

    Lightning's own suggestion differentiates by the rate itself, after an average that reaches back over half of the
    test: noise at the smallest rates, a billionth from each other, outweighs all that follows.

    Raises:
        ConfigError: The loss falls nowhere.
    """
    known = np.array(losses)
    known = known[: np.argmin(np.append(np.isfinite(known), False))]  # up to where it diverges
    steps = np.arange(len(known))
    weights = np.exp(-0.5 * ((steps[:, None] - steps) / _LR_SMOOTHING) ** 2)
    smooth = weights @ known / weights.sum(1)
    slopes = np.diff(smooth)
    if not (slopes < 0).any():
        raise ConfigError("lr can't be auto here: no step of the range test lowered the loss")
    chosen = int(slopes.argmin())
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    axes.semilogx(rates[: len(known)], known, ".", label="loss")
    axes.semilogx(rates[: len(known)], smooth, label="smoothed")
    axes.plot(rates[chosen], smooth[chosen], "o", label=f"{rates[chosen]:.3g}: it falls fastest")
    axes.set(xlabel="learning rate", ylabel="loss")
    axes.legend()
    figure.savefig(picture)
    return rates[chosen]


def _tuning_trainer(config: TrainConfig, out: Path) -> Trainer:
    return new_trainer(
        config.device, default_root_dir=out, max_epochs=max(config.epochs, _LR_STEPS), limit_val_batches=0,
        precision=PRECISIONS[config.precision],
    )  # fmt: skip


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

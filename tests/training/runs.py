"""Runs of seconds."""

from pathlib import Path

from fastseg.training import TrainConfig

IGNORED = 255


def config(data: Path, out: Path, **settings: object) -> TrainConfig:
    """A run of seconds: 9 training and 3 validation images."""
    given = {"epochs": 1, "batch_size": 4, "lr": 0.01, "widths": (4, 8), "val_fraction": 0.25, "device": "cpu"}
    return TrainConfig(data=data, out=out, **(given | settings))

"""Training, evaluation and prediction; the command line is a thin layer over this.

`SegmentationTask` and `SegmentationData` are Lightning's modules, for any network and any data; `train` makes a run of
them from settings. These and `evaluate` import Lightning, which takes seconds, when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fastseg.training.checkpoint import Metadata, load_checkpoint, save_checkpoint
from fastseg.training.config import TrainConfig
from fastseg.training.errors import CheckpointError, ConfigError, DivergedError
from fastseg.training.history import EpochRecord, Evaluation, History
from fastseg.training.networks import Architecture, Network
from fastseg.training.prediction import Viewing, predict
from fastseg.training.video import predict_video

if TYPE_CHECKING:
    from fastseg.training.datamodule import SegmentationData
    from fastseg.training.evaluation import evaluate
    from fastseg.training.run import train
    from fastseg.training.task import SegmentationTask

_ON_LIGHTNING = {
    "SegmentationData": "datamodule", "SegmentationTask": "task", "evaluate": "evaluation",
    "train": "run",
}  # fmt: skip

__all__ = [
    "Architecture",
    "CheckpointError",
    "ConfigError",
    "DivergedError",
    "EpochRecord",
    "Evaluation",
    "History",
    "Metadata",
    "Network",
    "SegmentationData",
    "SegmentationTask",
    "TrainConfig",
    "Viewing",
    "evaluate",
    "load_checkpoint",
    "predict",
    "predict_video",
    "save_checkpoint",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _ON_LIGHTNING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"fastseg.training.{_ON_LIGHTNING[name]}"), name)

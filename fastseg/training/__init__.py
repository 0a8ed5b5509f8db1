"""Training, evaluation and prediction with `fastseg.models`; the command line is a thin layer over this."""

from fastseg.training.checkpoint import Metadata, load_checkpoint, save_checkpoint
from fastseg.training.config import TrainConfig
from fastseg.training.engine import Evaluation
from fastseg.training.errors import CheckpointError, ConfigError, DivergedError
from fastseg.training.evaluation import evaluate
from fastseg.training.history import EpochRecord, History
from fastseg.training.loop import train
from fastseg.training.prediction import predict

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DivergedError",
    "EpochRecord",
    "Evaluation",
    "History",
    "Metadata",
    "TrainConfig",
    "evaluate",
    "load_checkpoint",
    "predict",
    "save_checkpoint",
    "train",
]

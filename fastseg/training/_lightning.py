"""Lightning's names that training uses, imported where torchvision may be one that torch can't load."""
# ruff: noqa: E402

from fastseg._torchvision import prepare_torchvision

prepare_torchvision()

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.rank_zero import rank_zero_only

__all__ = [
    "CSVLogger",
    "Callback",
    "CheckpointIO",
    "EMAWeightAveraging",
    "EarlyStopping",
    "LightningDataModule",
    "LightningModule",
    "Logger",
    "ModelCheckpoint",
    "RichProgressBar",
    "TensorBoardLogger",
    "Trainer",
    "Tuner",
    "WandbLogger",
    "rank_zero_only",
]

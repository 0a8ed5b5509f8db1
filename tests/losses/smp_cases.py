"""What the tests of fastseg.losses.smp share: modes, options, and the comparison with the originals."""

import itertools
from typing import Any

import torch
from torch import Tensor

from fastseg.losses import smp
from tests.losses.cases import SHAPES, check, logits, original, probabilities

CLASS_WEIGHTS = [0.5, 2.0, 1.0, 0.25, 3.0]
MAP_MODES = ("binary", "multilabel")
REGIONS = ("DiceLoss", "JaccardLoss", "TverskyLoss")
LOSSES = (*REGIONS, "FocalLoss", "SoftCrossEntropyLoss", "SoftBCEWithLogitsLoss")


def originals() -> Any:
    return original("segmentation_models_pytorch.losses")


def check_both(name: str, input: Tensor, target: Tensor, **options: Any) -> list[Tensor]:
    return check(getattr(smp, name)(**options), getattr(originals(), name)(**options), input, target)


def inputs(from_logits: bool, shape: tuple[int, ...] = SHAPES["image"], dtype: torch.dtype = torch.float32) -> Tensor:
    return logits(shape, dtype) if from_logits else probabilities(shape, dtype)


def combinations(**values: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Every combination of options; None, False and 0 leave the original's default."""
    combined = (dict(zip(values, each, strict=True)) for each in itertools.product(*values.values()))
    return [{name: value for name, value in options.items() if value not in (None, False)} for options in combined]


def named(options: dict[str, Any]) -> str:
    return "-".join(f"{name}={value}" for name, value in options.items()) or "default"

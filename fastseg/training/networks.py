"""The networks that can be trained, by name."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from fastseg import models
from fastseg.models import SegmentationModel
from fastseg.training.config import Backend, ModelKind

NETWORKS: dict[Backend, dict[ModelKind, type[SegmentationModel]]] = {
    "fastseg": {"fcn": models.FCN, "unet": models.UNet},
    "plain": {"fcn": models.plain.FCN, "unet": models.plain.UNet},
}


def complete_arguments(kind: ModelKind, **arguments: Any) -> dict[str, Any]:
    """All arguments of a network's constructor: the given ones that are not None, and its defaults."""
    given = {name: value for name, value in arguments.items() if value is not None}
    bound = inspect.signature(NETWORKS["fastseg"][kind]).bind(**given)
    bound.apply_defaults()
    return dict(bound.arguments)


def new_network(kind: ModelKind, backend: Backend, arguments: dict[str, Any]) -> SegmentationModel:
    """A network with the initial weights of He et al., "Delving deep into rectifiers" (2015), and no biases.

    Torch's own initial weights are smaller: without normalisation layers, activations and gradients shrink from layer
    to layer, and the first epochs are spent on growing them.
    """
    model = NETWORKS[backend][kind](**arguments)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def smallest_side(kind: ModelKind, arguments: dict[str, Any]) -> int:
    """The least height and width that a network takes, in pixels, given all arguments of its constructor."""
    stages = len(arguments["widths"])
    halvings = stages - 1 if kind == "unet" else stages  # the bottom of a U-Net is not pooled
    return int(2**halvings)

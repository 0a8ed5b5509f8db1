"""torchvision for what imports libraries that import it."""

import importlib
import importlib.util

import torch

_libraries = []  # what they define lasts as long as they do


def import_torchvision() -> None:
    """Imports torchvision where it is installed.

    Its wheels on the package index want CUDA's libraries; beside a torch for CPUs its compiled operators, which nothing
    here calls, are missing, and its import needs them declared.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)
        importlib.import_module("torchvision")

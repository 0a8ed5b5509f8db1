"""torchvision for libraries that import it."""

import importlib
import importlib.util

import torch

from fastseg._native import logger

_libraries: list[torch.library.Library] = []  # what they define lasts as long as they do


def prepare_torchvision() -> None:
    """Make torchvision importable where it is installed.

    The package index has wheels of torchvision for CUDA alone. Beside a torch for CPUs their compiled operators can't
    be loaded, and then neither can torchvision nor what imports it (timm, torchmetrics, Lightning), although none of
    these needs more of the operators than that they are declared.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        logger.info("torchvision's operators (nms and the like) can't be loaded beside torch %s", torch.__version__)
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)
        importlib.import_module("torchvision")

"""torchvision for libraries that import it."""

import importlib
import importlib.metadata
import importlib.util

import torch

from fastseg._native import logger

_libraries: list[torch.library.Library] = []  # what they define lasts as long as they do


def prepare_torchvision() -> None:
    """Make torchvision importable where its compiled operators can't be loaded; elsewhere this imports it alone."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        # A wheel for CUDA beside a torch for CPUs, as package indexes give it that have no other: Lightning (through
        # torchmetrics) and timm import torchvision, and would fail with it, although all that they need of its
        # compiled operators is that they are declared. An error with the remedy would be no help where there is none.
        logger.warning(
            "torchvision %s doesn't fit torch %s: nms, roi_align and the like don't work; both from one index do",
            importlib.metadata.version("torchvision"),
            torch.__version__,
        )
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)
        importlib.import_module("torchvision")

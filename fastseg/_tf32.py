"""torch's settings of TF32 for convolutions and for matrix products, as old and new versions spell them."""

from __future__ import annotations

import torch


def convolutions_take_tf32() -> bool:
    """Whether float32 convolutions on a GPU may round their factors to TF32's 10 bits."""
    convolutions = getattr(torch.backends.cudnn, "conv", None)  # since torch 2.9, which may refuse to tell the old flag
    if convolutions is not None:
        return convolutions.fp32_precision == "tf32"
    return torch.backends.cudnn.allow_tf32


def matrix_products_take_tf32() -> bool:
    """Whether float32 matrix products on a GPU may round their factors to TF32's 10 bits."""
    products = torch.backends.cuda.matmul
    precision = getattr(products, "fp32_precision", None)  # since torch 2.9, which may refuse to tell the old flag
    return products.allow_tf32 if precision is None else precision == "tf32"

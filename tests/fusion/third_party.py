"""Third-party models that are small enough for the tests, and what the pass is to find in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("benchmarks", reason="benchmarks/ is part of a checkout, not of the installed package")
from benchmarks.third_party.models import Builder, basic_unet, made, segformer, smp, torchvision, upernet_resnet

CLASSES = 5


class Model(NamedTuple):
    """A model of another library.

    Attributes:
        package: What it needs installed.
        build: Makes it.
        run: Loss and prediction of it for images and labels.
        training: The operators that are put in where it trains.
        evaluation: And in evaluation.
        shape: Of the images. Batch normalisation of a few values blows roundings up, so that a network that pools to
            one pixel gets four of them.
    """

    package: str
    build: Builder
    run: Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]
    training: list[str]
    evaluation: list[str]
    shape: tuple[int, int, int, int] = (2, 3, 64, 64)


def _loss_of_logits(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = model(images)
    return F.cross_entropy(logits, labels, ignore_index=255), logits.argmax(1)


def _loss_with_auxiliary(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = model(images)
    losses = [F.cross_entropy(logits[name], labels, ignore_index=255) for name in ("out", "aux")]
    return losses[0] + 0.5 * losses[1], logits["out"].argmax(1)


def _loss_within(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """transformers' models know the loss themselves."""
    outputs = model(pixel_values=images, labels=labels)
    logits = outputs.logits
    if logits.shape[-2:] != labels.shape[-2:]:
        logits = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
    return outputs.loss, logits.argmax(1)


_UPERNET, _BASIC_UNET = upernet_resnet((16, 32, 64, 64), 1, 32), basic_unet((8, 8, 16, 16, 16, 8))
_PLAIN, _CONV, _POOL = "conv2d", "conv_relu_pool2d", "relu_pool2d"
_LOSS, _UP_LOSS, _ARGMAX = "cross_entropy", "upsample_cross_entropy", "upsample_argmax"
_BACK, _BACK_AUXILIARY = [_ARGMAX, _UP_LOSS], [_ARGMAX, _UP_LOSS, _UP_LOSS]
_SMP, _VISION = "segmentation_models_pytorch", "torchvision"

# Convolutions without a pool are taken where there are pixels enough, at these small sizes in a few levels, and where
# taps see nothing but padding, as in torchvision's last stage and head.
MODELS = {
    "smp.Unet-resnet18": Model(
        _SMP, smp("Unet", "resnet18"), _loss_of_logits, [*[_PLAIN] * 11, _LOSS, _POOL],
        [*[_PLAIN] * 3, *[_CONV] * 9, _LOSS],
    ),
    "smp.Unet-vgg11": Model(
        _SMP, smp("Unet", "vgg11"), _loss_of_logits, [*[_PLAIN] * 7, *[_CONV] * 6, _LOSS],
        [_PLAIN, *[_CONV] * 12, _LOSS],
    ),
    "smp.FPN-resnet18": Model(
        _SMP, smp("FPN", "resnet18"), _loss_of_logits, [*[_PLAIN] * 5, _POOL, *_BACK],
        [*[_PLAIN] * 3, *[_CONV] * 3, *_BACK],
    ),
    "smp.FPN-vgg11": Model(
        _SMP, smp("FPN", "vgg11"), _loss_of_logits, [_PLAIN, *[_CONV] * 6, *_BACK], [_PLAIN, *[_CONV] * 6, *_BACK]
    ),
    # SMP has no DeepLabV3Plus on VGG.
    "smp.DeepLabV3Plus-resnet18": Model(
        _SMP, smp("DeepLabV3Plus", "resnet18"), _loss_of_logits, [*[_PLAIN] * 7, _POOL, *_BACK],
        [*[_PLAIN] * 4, *[_CONV] * 4, *_BACK], (4, 3, 64, 64),
    ),
    "torchvision.fcn_resnet50": Model(
        _VISION, torchvision("fcn_resnet50"), _loss_with_auxiliary, [*[_PLAIN] * 5, _POOL, *_BACK_AUXILIARY],
        [*[_PLAIN] * 2, *[_CONV] * 4, *_BACK_AUXILIARY], (4, 3, 32, 32),
    ),
    "torchvision.deeplabv3_resnet50": Model(
        _VISION, torchvision("deeplabv3_resnet50"), _loss_with_auxiliary, [*[_PLAIN] * 8, _POOL, *_BACK_AUXILIARY],
        [*[_PLAIN] * 5, *[_CONV] * 4, *_BACK_AUXILIARY], (4, 3, 32, 32),
    ),
    "transformers.Segformer-b0": Model("transformers", segformer(), _loss_within, _BACK, _BACK),
    "transformers.UperNet": Model(
        "transformers", _UPERNET, _loss_within, [*[_PLAIN] * 4, _POOL, *_BACK_AUXILIARY],
        [_PLAIN, *[_CONV] * 4, *_BACK_AUXILIARY],
    ),
    "monai.BasicUNet": Model(
        "monai", _BASIC_UNET, _loss_of_logits, [*[_PLAIN] * 7, _LOSS], [*[_PLAIN] * 7, _LOSS], (2, 1, 64, 64)
    ),
}  # fmt: skip


def build(name: str) -> nn.Module:
    """The model, as `benchmarks.third_party.models.made` makes it."""
    return made(MODELS[name].build, CLASSES)


def batch(name: str, seed: int) -> tuple[Tensor, Tensor]:
    """Images and their labels."""
    generator = torch.Generator().manual_seed(seed)
    count, _, height, width = MODELS[name].shape
    images = torch.randn(MODELS[name].shape, generator=generator)
    labels = torch.randint(CLASSES, (count, height, width), generator=generator)
    labels[:, :4] = 255
    return images, labels

"""Models that others wrote, with random weights, small enough for the tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision_import import import_torchvision

CLASSES = 5

import_torchvision()  # which timm and segmentation_models_pytorch import too


class Other(NamedTuple):
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
    build: Callable[[], nn.Module]
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


def _smp(architecture: str, encoder: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import segmentation_models_pytorch

        return getattr(segmentation_models_pytorch, architecture)(encoder, encoder_weights=None, classes=CLASSES)

    return build


def _torchvision_model(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision.models import segmentation

        return getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=CLASSES, aux_loss=True)

    return build


def _segformer() -> nn.Module:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    return SegformerForSemanticSegmentation(SegformerConfig(num_labels=CLASSES, semantic_loss_ignore_index=255))


def _upernet() -> nn.Module:
    from transformers import ResNetConfig, UperNetConfig, UperNetForSemanticSegmentation

    widths = [16, 32, 64, 64]
    stages = [f"stage{i}" for i in range(1, 5)]
    backbone = ResNetConfig(
        embedding_size=16, hidden_sizes=widths, depths=[1] * 4, layer_type="basic", out_features=stages
    )
    return UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=backbone, hidden_size=32, num_labels=CLASSES, auxiliary_in_channels=widths[2],
            auxiliary_channels=16, loss_ignore_index=255,
        )
    )  # fmt: skip


def _basic_unet() -> nn.Module:
    from monai.networks.nets import BasicUNet

    return BasicUNet(spatial_dims=2, in_channels=1, out_channels=CLASSES, features=(8, 8, 16, 16, 16, 8))


_CONV, _POOL = "conv_relu_pool2d", "relu_pool2d"
_LOSS, _UP_LOSS, _ARGMAX = "cross_entropy", "upsample_cross_entropy", "upsample_argmax"
_BACK = [_ARGMAX, _UP_LOSS]
_SMP, _VISION = "segmentation_models_pytorch", "torchvision"

# Convolutions without a pool are taken where there are pixels enough, at these small sizes in a few levels.
OTHERS = {
    "smp.Unet-resnet18": Other(
        _SMP, _smp("Unet", "resnet18"), _loss_of_logits, [_LOSS, _POOL], [*[_CONV] * 9, _LOSS]
    ),
    "smp.Unet-vgg11": Other(
        _SMP, _smp("Unet", "vgg11"), _loss_of_logits, [*[_CONV] * 6, _LOSS], [*[_CONV] * 12, _LOSS]
    ),
    "smp.FPN-resnet18": Other(
        _SMP, _smp("FPN", "resnet18"), _loss_of_logits, [_POOL, *_BACK], [*[_CONV] * 3, *_BACK]
    ),
    "smp.FPN-vgg11": Other(_SMP, _smp("FPN", "vgg11"), _loss_of_logits, [*[_CONV] * 6, *_BACK], [*[_CONV] * 6, *_BACK]),
    # SMP has no DeepLabV3Plus on VGG.
    "smp.DeepLabV3Plus-resnet18": Other(
        _SMP, _smp("DeepLabV3Plus", "resnet18"), _loss_of_logits, [_POOL, *_BACK], [*[_CONV] * 4, *_BACK],
        (4, 3, 64, 64),
    ),
    "torchvision.fcn_resnet50": Other(
        _VISION, _torchvision_model("fcn_resnet50"), _loss_with_auxiliary, [_POOL, *_BACK, _UP_LOSS],
        [*[_CONV] * 4, *_BACK, _UP_LOSS], (4, 3, 32, 32),
    ),
    "torchvision.deeplabv3_resnet50": Other(
        _VISION, _torchvision_model("deeplabv3_resnet50"), _loss_with_auxiliary, [_POOL, *_BACK, _UP_LOSS],
        [*[_CONV] * 4, *_BACK, _UP_LOSS], (4, 3, 32, 32),
    ),
    "transformers.Segformer-b0": Other("transformers", _segformer, _loss_within, _BACK, _BACK),
    "transformers.UperNet": Other(
        "transformers", _upernet, _loss_within, [_POOL, *_BACK, _UP_LOSS], [*[_CONV] * 4, *_BACK, _UP_LOSS]
    ),
    "monai.BasicUNet": Other("monai", _basic_unet, _loss_of_logits, [_LOSS], [_LOSS], (2, 1, 64, 64)),
}  # fmt: skip


def build(name: str) -> nn.Module:
    """The model, always with the same weights; without dropout, whose random numbers differ between dtypes."""
    torch.manual_seed(0)
    model = OTHERS[name].build()
    for module in model.modules():
        for rate in ("p", "drop_prob"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
    return model


def batch(name: str, seed: int) -> tuple[Tensor, Tensor]:
    """Images and their labels."""
    generator = torch.Generator().manual_seed(seed)
    count, _, height, width = OTHERS[name].shape
    images = torch.randn(OTHERS[name].shape, generator=generator)
    labels = torch.randint(CLASSES, (count, height, width), generator=generator)
    labels[:, :4] = 255
    return images, labels

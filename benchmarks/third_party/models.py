"""Models of other libraries, with random weights: how each is made, and what its users call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.third_party.plain_conv_unet import PlainConvUNet
from fastseg._torchvision import prepare_torchvision

IGNORED = 255  # the label of pixels that don't count
STAGES = ["stage1", "stage2", "stage3", "stage4"]  # of a backbone, as transformers names what a head gets
AUXILIARY_WEIGHT = 0.5  # of the loss of torchvision's second head, as in its reference training

Builder = Callable[[int], nn.Module]  # makes a model for a number of classes

prepare_torchvision()  # which timm and segmentation_models_pytorch import too

# ---- how they are made ----


def smp(architecture: str, encoder: str) -> Builder:
    """segmentation_models_pytorch's."""

    def build(classes: int) -> nn.Module:
        import segmentation_models_pytorch

        model = getattr(segmentation_models_pytorch, architecture)(encoder, encoder_weights=None, classes=classes)
        for name in ("_conv_head", "_bn1"):  # of EfficientNet's classifier, which is there and isn't called
            getattr(model.encoder, name, nn.Identity()).requires_grad_(False)
        if hasattr(model.encoder, "_drop_connect_rate"):
            model.encoder._drop_connect_rate = 0.0  # it is random: no two training steps would agree
        return model

    return build


def torchvision(name: str) -> Builder:
    """torchvision's, with an auxiliary head."""

    def build(classes: int) -> nn.Module:
        from torchvision.models import segmentation

        return getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=classes, aux_loss=True)

    return build


def segformer(**sizes: Any) -> Builder:
    """SegFormer of transformers; without ``sizes``, arguments of its configuration, it is SegFormer-b0."""

    def build(classes: int) -> nn.Module:
        from transformers import SegformerConfig, SegformerForSemanticSegmentation

        return SegformerForSemanticSegmentation(
            SegformerConfig(num_labels=classes, semantic_loss_ignore_index=IGNORED, **sizes)
        )

    return build


def upernet_resnet(widths: tuple[int, ...], depth: int, hidden: int) -> Builder:
    """UperNet of transformers on a ResNet.

    Args:
        widths: Channels of the ResNet's stages, and of its stem the first of them.
        depth: Blocks in each stage.
        hidden: Channels of the head.
    """

    def build(classes: int) -> nn.Module:
        from transformers import ResNetConfig

        backbone = ResNetConfig(
            embedding_size=widths[0], hidden_sizes=list(widths), depths=[depth] * len(widths), layer_type="basic",
            out_features=STAGES,
        )  # fmt: skip
        return _upernet(backbone, hidden, classes)

    return build


def upernet_convnext(hidden: int) -> Builder:
    """UperNet of transformers on a ConvNeXt-tiny, with a head of ``hidden`` channels."""

    def build(classes: int) -> nn.Module:
        from transformers import ConvNextConfig

        tiny = ConvNextConfig(hidden_sizes=[96, 192, 384, 768], depths=[3, 3, 9, 3], out_features=STAGES)
        return _upernet(tiny, hidden, classes)

    return build


def _upernet(backbone: Any, hidden: int, classes: int) -> nn.Module:
    from transformers import UperNetConfig, UperNetForSemanticSegmentation

    return UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=backbone, hidden_size=hidden, num_labels=classes,
            auxiliary_in_channels=backbone.hidden_sizes[2], auxiliary_channels=hidden // 2, loss_ignore_index=IGNORED,
        )
    )  # fmt: skip


def basic_unet(features: tuple[int, ...]) -> Builder:
    """MONAI's BasicUNet for gray images, with these channels."""

    def build(classes: int) -> nn.Module:
        from monai.networks.nets import BasicUNet

        return BasicUNet(spatial_dims=2, in_channels=1, out_channels=classes, features=features)

    return build


def plain_conv_unet(features: tuple[int, ...]) -> Builder:
    """nnU-Net's for gray images, with these channels."""
    return lambda classes: PlainConvUNet(1, classes, features)


def made(build: Builder, classes: int) -> nn.Module:
    """The model, always with the same weights; without dropout, whose random numbers differ between dtypes."""
    torch.manual_seed(0)
    model = build(classes)
    for module in model.modules():
        for rate in ("p", "drop_prob"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
    return model


# ---- what their users call ----


class Use(NamedTuple):
    """How the models of a library are called.

    Attributes:
        logits: The logits of images, at the images' size.
        loss: The loss of images and their labels.
    """

    logits: Callable[[nn.Module, Tensor], Tensor]
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    return model(images)


def _loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images), labels, ignore_index=IGNORED)


def _logits_of_main_head(model: nn.Module, images: Tensor) -> Tensor:
    return model(images)["out"]


def _loss_of_both_heads(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    heads = model(images)
    out, aux = (F.cross_entropy(heads[name], labels, ignore_index=IGNORED) for name in ("out", "aux"))
    return out + AUXILIARY_WEIGHT * aux


def _logits_upsampled(model: nn.Module, images: Tensor) -> Tensor:
    logits = model(pixel_values=images).logits
    if logits.shape[-2:] == images.shape[-2:]:
        return logits
    return F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)


def _loss_within(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return model(pixel_values=images, labels=labels).loss


LOGITS = Use(_logits, _loss)
TWO_HEADS = Use(_logits_of_main_head, _loss_of_both_heads)
OWN_LOSS = Use(_logits_upsampled, _loss_within)  # transformers' models know the loss themselves

"""The third-party models that are measured, and how a step and a prediction of each are called."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases.bench_models import ModelCase
from benchmarks.harness.suite import ONNXRUNTIME, OPENVINO, Contestant, Job
from benchmarks.third_party.models import (
    LOGITS,
    OWN_LOSS,
    TWO_HEADS,
    Builder,
    Use,
    basic_unet,
    made,
    plain_conv_unet,
    segformer,
    smp,
    torchvision,
    upernet_convnext,
    upernet_resnet,
)
from fastseg.testing import MEMORY_FORMATS

INSTALL = "pip install '.[models]'"


class Called(nn.Module):
    """A model's loss, or its prediction where there are no labels, as its users write them."""

    def __init__(self, model: nn.Module, use: Use) -> None:
        super().__init__()
        self.model, self.use = model, use

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """The loss, or the classes."""
        if labels is None:
            return self.use.logits(self.model, images).argmax(1)
        return self.use.loss(self.model, images, labels)


@dataclass(frozen=True)
class ThirdPartyCase(ModelCase):
    """A model of another library on images of a shape.

    Args:
        package: Its library.
        builder: Makes it.
        use: How it is called.
        classes: Number of classes.
        inductor: Options that Inductor needs to compile it, for torch.compile and the backend alike.
    """

    package: str
    builder: Builder
    use: Use
    classes: int
    inductor: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """Library and model."""
        return self.network

    @property
    def fullgraph(self) -> bool:
        """Some do what TorchDynamo can't capture, between graphs."""
        return False

    @property
    def deployments(self) -> tuple[str, ...]:
        """Both."""
        return (OPENVINO, ONNXRUNTIME)

    def contestants(self, training: bool) -> list[Contestant]:
        """Predictions in both memory formats; steps as the libraries make the models, to end in time."""
        everyone = super().contestants(training)
        return [contestant for contestant in everyone if not training or contestant.layout == "nchw"]

    def missing(self) -> str | None:
        """Why it can't be measured, or None."""
        return None if importlib.util.find_spec(self.package) else f"needs {self.package}: {INSTALL}"

    def job(self, fused: bool, layout: str, training: bool, dtype: torch.dtype | None = None) -> Job:
        """The loss with its gradients, or the prediction."""
        model: nn.Module = Called(self.made(dtype), self.use)
        model.to(memory_format=MEMORY_FORMATS[layout])  # type: ignore[call-overload]
        images = self.device.make(self.images, dtype, layout=layout)
        # transformers' models prepare themselves in their first call, in a way that breaks TorchDynamo's graphs.
        with torch.no_grad():
            model.eval()(images)
        model.train(training)
        call = torch.compile(model, dynamic=False, backend="fastseg") if fused else model
        if not training:
            model.requires_grad_(False)  # what is deployed takes the weights as constants
            return Job(call, (images,))
        labels = self.device.make_labels(self.labels, self.classes, seed=1)
        trained = tuple(parameter for parameter in model.parameters() if parameter.requires_grad)
        return Job(call, (images, labels), trained)

    def made(self, dtype: torch.dtype | None) -> nn.Module:
        """The model, with the same weights every time."""
        return made(self.builder, self.classes).to(self.device.name, dtype or self.device.dtype)

    def judged(self, results: list[Tensor]) -> list[Tensor]:
        """All gradients as one: in a deep network those of some layers are next to nothing but roundings."""
        judged = super().judged(results)
        return judged if len(judged) == 1 else [judged[0], torch.cat([gradient.flatten() for gradient in judged[1:]])]

    @functools.cached_property
    def logits(self) -> Tensor:
        """The true logits, at the images' size."""
        with torch.no_grad():
            return self.use.logits(self.made(torch.float64).eval(), self.device.make(self.images, torch.float64))


# Inductor of torch 2.13 makes a gradient of replication_pad2d channels_last, and then refuses it.
_NO_CHANNELS_LAST = (("layout_optimization", False),)
_SMP, _VISION, _HUGGING = "segmentation_models_pytorch", "torchvision", "transformers"
_RESNET18 = upernet_resnet((64, 128, 256, 512), 2, 128)
_B2 = segformer(depths=[3, 4, 6, 3], hidden_sizes=[64, 128, 320, 512], decoder_hidden_size=768)

CASES = [
    ThirdPartyCase("smp.Unet-resnet18", (2, 3, 256, 256), _SMP, smp("Unet", "resnet18"), LOGITS, 21),
    ThirdPartyCase("smp.Unet-vgg11", (2, 3, 192, 192), _SMP, smp("Unet", "vgg11"), LOGITS, 21),
    ThirdPartyCase("smp.FPN-resnet18", (2, 3, 256, 256), _SMP, smp("FPN", "resnet18"), LOGITS, 21),
    ThirdPartyCase("smp.FPN-vgg11", (2, 3, 192, 192), _SMP, smp("FPN", "vgg11"), LOGITS, 21),
    ThirdPartyCase("smp.Unet-mobilenet_v2", (2, 3, 256, 256), _SMP, smp("Unet", "mobilenet_v2"), LOGITS, 21),
    ThirdPartyCase("smp.Unet-efficientnet-b0", (2, 3, 256, 256), _SMP, smp("Unet", "efficientnet-b0"), LOGITS, 21),
    # SMP has no DeepLabV3Plus on VGG. Batch normalisation of one pixel's values needs some images, here and below.
    ThirdPartyCase("smp.DeepLabV3Plus-resnet18", (4, 3, 192, 192), _SMP, smp("DeepLabV3Plus", "resnet18"), LOGITS, 21),
    ThirdPartyCase("torchvision.fcn_resnet50", (4, 3, 96, 96), _VISION, torchvision("fcn_resnet50"), TWO_HEADS, 21),
    ThirdPartyCase(
        "torchvision.deeplabv3_resnet50", (4, 3, 96, 96), _VISION, torchvision("deeplabv3_resnet50"), TWO_HEADS, 21
    ),
    ThirdPartyCase(
        "torchvision.deeplabv3_resnet101", (4, 3, 96, 96), _VISION, torchvision("deeplabv3_resnet101"), TWO_HEADS, 21
    ),
    ThirdPartyCase("transformers.Segformer-b0", (1, 3, 512, 512), _HUGGING, segformer(), OWN_LOSS, 150),
    ThirdPartyCase("transformers.Segformer-b2", (1, 3, 512, 512), _HUGGING, _B2, OWN_LOSS, 150),
    ThirdPartyCase("transformers.UperNet-resnet18", (2, 3, 256, 256), _HUGGING, _RESNET18, OWN_LOSS, 150),
    ThirdPartyCase(
        "transformers.UperNet-ConvNeXt-tiny", (2, 3, 256, 256), _HUGGING, upernet_convnext(512), OWN_LOSS, 150
    ),
    ThirdPartyCase(
        "monai.BasicUNet",
        (2, 1, 192, 192),
        "monai",
        basic_unet((32, 32, 64, 128, 256, 32)),
        LOGITS,
        5,
        _NO_CHANNELS_LAST,
    ),
    ThirdPartyCase(
        "nnU-Net.PlainConvUNet", (2, 1, 192, 192), "torch", plain_conv_unet((32, 64, 128, 256, 512, 512)), LOGITS, 5
    ),
]

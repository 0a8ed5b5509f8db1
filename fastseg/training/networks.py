"""The networks that can be trained, by name, and what training, evaluation and prediction see of one."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastseg import functional, models, reference
from fastseg._torchvision import prepare_torchvision
from fastseg.models import SegmentationModel
from fastseg.training.config import MODELS, Backend
from fastseg.training.errors import ConfigError

OWN: dict[Backend, dict[str, type[SegmentationModel]]] = {
    "fastseg": {"fcn": models.FCN, "unet": models.UNet},
    "inductor": {"fcn": models.plain.FCN, "unet": models.plain.UNet},
    "eager": {"fcn": models.plain.FCN, "unet": models.plain.UNet},
}
LIBRARIES = {
    "smp": "segmentation_models_pytorch",
    "torchvision": "torchvision.models.segmentation",
    "transformers": "transformers",
}
COMPILE: dict[str, dict[str, Any]] = {"fastseg": {"backend": "fastseg"}, "inductor": {"backend": "inductor"}}

_ENCODERS = (("encoder",), ("backbone",), ("segformer",), ("stages",), ("expand", "pool"))  # what networks call theirs
_SEGFORMERS: dict[str, dict[str, Any]] = {  # of the paper's table 6, as the published checkpoints have them
    "segformer-b0": {},
    **{
        f"segformer-b{number}": {
            "hidden_sizes": [64, 128, 320, 512], "depths": depths, "decoder_hidden_size": 256 if number == 1 else 768,
        }
        for number, depths in enumerate(([2, 2, 2, 2], [3, 4, 6, 3], [3, 4, 18, 3], [3, 8, 27, 3], [3, 6, 40, 3]), 1)
    },
}  # fmt: skip


def operators_of(backend: Backend) -> ModuleType:
    """The module that has a backend's operators of what follows a network."""
    return functional if backend == "fastseg" else reference


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What it takes to build a network.

    Args:
        model: Its name, as in `TrainConfig`.
        num_classes: Number of classes.
        in_channels: Channels of the images.
        encoder: As in `TrainConfig`.
        widths: As in `TrainConfig`.
        kernel_size: As in `TrainConfig`.
    """

    model: str
    num_classes: int
    in_channels: int = 3
    encoder: str | None = None
    widths: tuple[int, ...] | None = None
    kernel_size: int = 3

    @property
    def library(self) -> str | None:
        """The module that has it; None for fastseg's own."""
        before = self.model.partition(":")[0]
        return None if self.model in OWN["eager"] else LIBRARIES.get(before, before)

    @property
    def is_foreign(self) -> bool:
        """Whether a function that the user named makes it."""
        return self.library is not None and self.model.partition(":")[0] not in LIBRARIES

    @property
    def smallest_side(self) -> int:
        """The least height and width of images that it is known to take."""
        if self.library is not None:
            return 1
        levels = len(self.widths or inspect.signature(OWN["eager"][self.model]).parameters["widths"].default)
        return int(2 ** (levels - (self.model == "unet")))  # the bottom of a U-Net is not pooled


class Network(nn.Module):
    """A network as the loss, the scores and the prediction see it: logits at its own resolution.

    Where the network ends in an upsampling (those of fastseg.models, segmentation_models_pytorch, torchvision and
    transformers do, and a `torch.nn.Sequential` may), it is left to what follows, so that no logits of the images'
    size are in memory.

    Args:
        model: Images ``[N, C, H, W]`` to logits ``[N, num_classes, h, w]``, or to a mapping that has them under "out"
            or "logits" and those of an auxiliary head under "aux", or to a sequence, the main logits first.
        num_classes: Number of classes; None takes the network's attribute of this name.
        backend: As in `TrainConfig`. Decides the operators of the back end; `Network.compile` puts in the others.

    Attributes:
        grid: How the logits are upsampled: "mode" and "align_corners" of `fastseg.functional.upsample_argmax`.
    """

    def __init__(self, model: nn.Module, num_classes: int | None = None, *, backend: Backend = "fastseg") -> None:
        super().__init__()
        classes = getattr(model, "num_classes", None) if num_classes is None else num_classes
        if not isinstance(classes, int):
            raise ConfigError(f"num_classes must be given: {type(model).__name__} doesn't say it")
        self.model = model
        self.num_classes = classes
        self.backend: Backend = backend
        self.grid: dict[str, Any] = {"mode": "bilinear", "align_corners": False}
        self._frozen: tuple[str, ...] = ()
        self.divisor = 1
        self._maps = self._split()

    @property
    def operators(self) -> ModuleType:
        """The module that has the operators of the back end."""
        return operators_of(self.backend)

    def _split(self) -> Callable[[Tensor], Any]:
        """What gives the logits of images before any upsampling, and the main ones first."""
        model, library = self.model, type(self.model).__module__.partition(".")[0]
        if isinstance(model, SegmentationModel):
            return model.logits
        if library == "segmentation_models_pytorch":
            head: Any = model.segmentation_head
            self.divisor = model.encoder.output_stride if model.requires_divisible_input_shape else 1  # type: ignore
            if isinstance(head, nn.Sequential):  # convolution, upsampling, activation; DPT's isn't one
                _, upsampling, activation = head.children()
                if isinstance(activation.activation, nn.Identity) and self._leave(upsampling):
                    return self._smp
        if library == "torchvision" and hasattr(model, "backbone") and hasattr(model, "classifier"):
            return self._torchvision
        if isinstance(model, nn.Sequential) and self._leave(model[-1]):
            return self._but_the_last
        return self._whole

    def _leave(self, layer: nn.Module) -> bool:
        """Whether a network's last layer can be left to the back end, which is then told its grid."""
        if isinstance(layer, nn.Upsample) and layer.mode in ("bilinear", "nearest"):
            self.grid = {"mode": layer.mode, "align_corners": bool(layer.align_corners)}
            return True
        return isinstance(layer, nn.Identity)

    def _whole(self, images: Tensor) -> Any:
        return self.model(images)

    def _but_the_last(self, images: Tensor) -> Tensor:
        for layer in list(self.model.children())[:-1]:
            images = layer(images)
        return images

    def _smp(self, images: Tensor) -> Tensor:
        model: Any = self.model
        return model.segmentation_head[0](model.decoder(model.encoder(images)))

    def _torchvision(self, images: Tensor) -> list[Tensor]:
        model: Any = self.model
        features = model.backbone(images)
        auxiliary = getattr(model, "aux_classifier", None) if self.training else None
        if "out" not in features:
            return [model.classifier(features)]  # LRASPP takes two levels
        return [model.classifier(features["out"]), *([] if auxiliary is None else [auxiliary(features["aux"])])]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Logits ``[N, num_classes, h, w]`` of images ``[N, C, H, W]``, then those of auxiliary heads, if any.

        Networks that take multiples of a number of pixels see images resized to the next ones, bilinearly.
        """
        size = [-(-extent // self.divisor) * self.divisor for extent in images.shape[-2:]]
        if size != list(images.shape[-2:]):
            images = F.interpolate(images, size, mode="bilinear", align_corners=False)
        maps = self._maps(images)
        if isinstance(maps, Mapping):
            names = [name for name in ("out", "logits", "aux") if name in maps]
            return [maps[name] for name in names]
        return list(maps) if isinstance(maps, Sequence) else [maps]

    def logits(self, images: Tensor) -> Tensor:
        """The main logits alone, at the network's own resolution."""
        return self(images)[0]

    def predict(self, images: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """The most likely class of every pixel.

        Args:
            images: ``[N, C, H, W]``.
            size: The masks' (height, width); None for the images'.

        Returns:
            Masks ``[N, H, W]``, uint8 for up to 256 classes, else int64.
        """
        with torch.no_grad():
            logits = self.logits(images)
        return self.operators.upsample_argmax(logits, size or tuple(images.shape[-2:]), **self.grid)

    def freeze_encoder(self) -> None:
        """Keep the encoder's weights and its normalisation statistics as they are.

        Raises:
            ConfigError: The network has nothing that is called encoder or backbone.
        """
        found = [names for names in _ENCODERS if all(hasattr(self.model, name) for name in names)]
        if not found:
            raise ConfigError(f"freeze_encoder: {type(self.model).__name__} has no encoder or backbone")
        self._frozen = found[0]
        for name in self._frozen:
            self.model.get_submodule(name).requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Network:
        """As `torch.nn.Module.train`, but for an encoder that is frozen."""
        super().train(mode)
        for name in self._frozen:
            self.model.get_submodule(name).eval()
        return self


def build(architecture: Architecture, backend: Backend, *, pretrained: bool = False) -> Network:
    """A network with initial weights from torch's global generator, or with pretrained ones.

    Raises:
        ConfigError: There is no such network, or no way to it.
    """
    kind, _, name = architecture.model.partition(":")
    if architecture.library is None:
        if pretrained:
            raise ConfigError(f"weights must be none or a file for {architecture.model}, but it is pretrained")
        return Network(_own(architecture, backend), backend=backend)
    try:
        hub = logging.getLogger("huggingface_hub")
        hub.setLevel(max(hub.level, logging.ERROR))  # where there is no network, it logs each of its tries
        model = _MAKERS.get(kind, _foreign)(architecture, name, pretrained)
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"weights: the pretrained ones of {architecture.model} can't be had: {reason}") from error
    return Network(model, architecture.num_classes, backend=backend)


def compiled(network: Network, architecture: Architecture, backend: Backend, **options: Any) -> Network:
    """The network, compiled in place where the backend says so; fastseg's own networks hold its operators already."""
    if backend in COMPILE and not (backend == "fastseg" and architecture.library is None):
        network.compile(**COMPILE[backend], **options)
    return network


def _own(architecture: Architecture, backend: Backend) -> SegmentationModel:
    """A network of fastseg's own, with the initial weights of He et al., "Delving deep into rectifiers" (2015).

    Torch's own initial weights are smaller: without normalisation layers, activations and gradients shrink from layer
    to layer, and the first epochs are spent on growing them.
    """
    model = own_network(architecture, backend)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def own_network(architecture: Architecture, backend: Backend) -> SegmentationModel:
    """A network of fastseg's own as its constructor gives it."""
    widths = {} if architecture.widths is None else {"widths": architecture.widths}
    return OWN[backend][architecture.model](
        architecture.in_channels, num_classes=architecture.num_classes, kernel_size=architecture.kernel_size, **widths
    )


def _library(architecture: Architecture) -> ModuleType:
    prepare_torchvision()
    assert architecture.library is not None
    try:
        return importlib.import_module(architecture.library)
    except ModuleNotFoundError as error:
        remedy = "it is not on Python's path" if architecture.is_foreign else "install fastseg-kernels[models]"
        raise ConfigError(f"model {architecture.model} needs {error.name}: {remedy}") from error


def _choose(what: str, name: str, known: Sequence[str]) -> str:
    if name not in known:
        near = ", ".join(difflib.get_close_matches(name, known, 5, 0.3) or list(known)[:5])
        raise ConfigError(f"{what} must be one of its library's, such as {near}, but it is {name!r}")
    return name


def _smp(architecture: Architecture, name: str, pretrained: bool) -> nn.Module:
    library = _library(architecture)
    kinds = {kind.__name__: kind for kind in library.MODEL_ARCHITECTURES_MAPPING.values()}
    encoder = architecture.encoder or "resnet34"
    if not encoder.startswith("tu-"):  # timm's own names
        _choose("encoder", encoder, library.encoders.get_encoder_names())
    return kinds[_choose("model", name, list(kinds))](
        encoder, encoder_weights="imagenet" if pretrained else None, in_channels=architecture.in_channels,
        classes=architecture.num_classes,
    )  # fmt: skip


def _torchvision(architecture: Architecture, name: str, pretrained: bool) -> nn.Module:
    library = _library(architecture)
    known = importlib.import_module("torchvision.models").list_models(library)
    heads = {} if name.startswith("lraspp") else {"aux_loss": True}
    model: nn.Module = getattr(library, _choose("model", name, known))(
        weights=None, weights_backbone="DEFAULT" if pretrained else None, num_classes=architecture.num_classes, **heads
    )
    if architecture.in_channels != 3:
        _refuse_channels(architecture, pretrained)
        where, first = next((name, part) for name, part in model.named_modules() if isinstance(part, nn.Conv2d))
        first_options: Any = {name: getattr(first, name) for name in ("kernel_size", "stride", "padding")}
        parent, _, attribute = where.rpartition(".")
        wider = nn.Conv2d(architecture.in_channels, first.out_channels, bias=first.bias is not None, **first_options)
        setattr(model.get_submodule(parent), attribute, wider)
    return model


def _transformers(architecture: Architecture, name: str, pretrained: bool) -> nn.Module:
    library = _library(architecture)
    _choose("model", name, list(_SEGFORMERS))
    kind, options = library.SegformerForSemanticSegmentation, {"num_labels": architecture.num_classes}
    if pretrained:
        _refuse_channels(architecture, pretrained)
        return kind.from_pretrained(f"nvidia/{name.replace('segformer', 'mit')}", **options)
    config = library.SegformerConfig(num_channels=architecture.in_channels, **_SEGFORMERS[name], **options)
    return kind(config)


def _refuse_channels(architecture: Architecture, pretrained: bool) -> None:
    if pretrained and architecture.in_channels != 3:
        raise ConfigError(
            f"weights: the pretrained ones take 3 channels, but the images have {architecture.in_channels}"
        )


def _foreign(architecture: Architecture, name: str, pretrained: bool) -> nn.Module:
    function = getattr(_library(architecture), name, None)
    if not callable(function):
        raise ConfigError(f"model must be {MODELS}, but {architecture.library} has no function {name}")
    if pretrained:
        raise ConfigError(f"weights must be none or a file for {architecture.model}, but it is pretrained")
    arguments = {"num_classes": architecture.num_classes, "in_channels": architecture.in_channels}
    try:
        inspect.signature(function).bind(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model {architecture.model} must take num_classes and in_channels: {error}") from error
    model = function(**arguments)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model {architecture.model} must give a torch.nn.Module, but it gave {type(model).__name__}")
    return model


_MAKERS = {"smp": _smp, "torchvision": _torchvision, "transformers": _transformers}

"""Where a network looks: attribution maps of a class, by Captum."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastseg.inference import logits_of

Method = Literal["gradcam", "integrated_gradients", "saliency"]


def explain(
    model: nn.Module,
    image: Tensor,
    target: int,
    method: Method = "gradcam",
    *,
    region: Tensor | None = None,
    layer: nn.Module | None = None,
    steps: int = 32,
) -> Tensor:
    """How much each pixel of an image speaks for a class, where the network finds it.

    What is explained is the sum of the class's logits over a region. "saliency" is the largest magnitude of its
    gradient over the image's channels (Simonyan et al., 2014); "integrated_gradients" the gradient's mean on the way
    from a black image, times the image, summed over channels (Sundararajan et al., 2017); "gradcam" a layer's channels,
    weighted by their gradients' means, and ReLU (Selvaraju et al., 2017; for segmentation Vinogradova et al., 2020).

    Args:
        model: As in `fastseg.sliding_window`; it runs in evaluation mode, and not compiled.
        image: ``[channels, H, W]``, as the network takes it: normalised, so that zero is the mean.
        target: The class, in [0, C).
        method: "gradcam", "integrated_gradients" or "saliency".
        region: bool ``[h, w]`` of the logits' own size; None for where the network finds the class.
        layer: Grad-CAM's, with an output ``[N, channels, h, w]``; None for the last convolution before the classifier.
        steps: Of the integral.

    Returns:
        float32 ``[H, W]``, on the image's device; not negative but for "integrated_gradients".

    Raises:
        ValueError: An argument doesn't fit, or the class isn't found in the image.
        ImportError: Captum isn't installed: ``pip install 'fastseg-kernels[explain]'``.
    """
    if method not in get_args(Method):
        raise ValueError(f"method: expected one of {', '.join(get_args(Method))}, got {method!r}")
    try:
        from captum import attr
    except ImportError as error:
        raise ImportError("explain needs captum: pip install 'fastseg-kernels[explain]'") from error
    training = model.training
    model.eval()
    try:
        images = image.detach()[None].requires_grad_()
        with torch.no_grad():
            logits = _logits(model, images)
        if not 0 <= target < logits.shape[1]:
            raise ValueError(f"target: expected a class in [0, {logits.shape[1]}), got {target}")
        if region is None:
            region = logits[0].argmax(0) == target
            if not region.any():
                raise ValueError(f"target: class {target} isn't found in the image; give a region")

        def score(images: Tensor) -> Tensor:
            return (_logits(model, images) * region).sum((2, 3))  # [N, C]

        if method == "saliency":
            return attr.Saliency(score).attribute(images, target=target)[0].amax(0).detach()
        if method == "integrated_gradients":
            gradients = attr.IntegratedGradients(score)
            found = gradients.attribute(images, target=target, n_steps=steps, internal_batch_size=1)
            return found[0].sum(0).float().detach()
        chosen = _last_convolution(model, images) if layer is None else layer
        found = attr.LayerGradCam(score, chosen).attribute(images, target=target, relu_attributions=True)
        return F.interpolate(found, image.shape[1:], mode="bilinear", align_corners=False)[0, 0].detach()
    finally:
        model.train(training)


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    """At the network's own resolution, and as it is, not compiled: hooks and gradients need its modules."""
    with torch.compiler.set_stance("force_eager"):
        return logits_of(getattr(model, "logits", model.forward)(images))


def _last_convolution(model: nn.Module, images: Tensor) -> nn.Module:
    """The convolution that runs before the last one, which classifies."""
    ran: list[nn.Module] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4:
            ran.append(module)

    convolutions = [module for module in model.modules() if getattr(module, "weight", None) is not None]
    hooks = [
        module.register_forward_hook(note)
        for module in convolutions
        if isinstance(module.weight, Tensor) and module.weight.ndim == 4
    ]
    try:
        with torch.no_grad():
            _logits(model, images)
    finally:
        for hook in hooks:
            hook.remove()
    if len(ran) < 2:
        raise ValueError("layer: the network has no convolution before its classifier; name a layer")
    return ran[-2]

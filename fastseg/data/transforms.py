"""Augmentation of images together with their masks, and normalisation of images."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from kornia.augmentation import (
    AugmentationSequential,
    ColorJitter,
    GeometricAugmentationBase2D,
    RandomHorizontalFlip,
    RandomRotation,
    RandomVerticalFlip,
)
from kornia.constants import DataKey, Resample
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # RGB, of images in 0..1
IMAGENET_STD = (0.229, 0.224, 0.225)

_HUE_SHARE = 5  # hues are a circle: half of it reaches every hue
_MAX_ROTATION = 180.0  # degrees: +-180 already reaches every angle


class Augment(nn.Module):
    """Flip, rotate, scale and crop images at random, and their masks in the same way; change the images' colours.

    Each image of a batch draws its own transformation from torch's global generator (``torch.manual_seed`` reproduces
    it). Images are resampled bilinearly, masks to the nearest pixel; pixels that a rotation brings in from outside are
    0 in the image and ``ignore_index`` in the mask, as are those that a crop lacks. The module transforms in
    training and evaluation mode alike.

    Args:
        hflip: Probability of a horizontal flip, in [0, 1].
        vflip: Probability of a vertical flip, in [0, 1].
        rotation: Largest angle in degrees, in [0, 180]; the angle is uniform in [-rotation, rotation].
        scale: Least and largest factor of the size, which is uniform between them; None for 1.
        crop: ``(height, width)`` of what is taken of the scaled image, at a place that is uniform among those where it
            lies within the image or, where it is larger, holds it; None for the image's size.
        jitter: Largest relative change of brightness, contrast and saturation, and a fifth of it of the hue, of RGB
            images, in [0, 1].
        ignore_index: Label of the mask's pixels that don't count.

    Raises:
        ValueError: A probability, the angle or a size is outside its range.
    """

    def __init__(
        self,
        *,
        hflip: float = 0.5,
        vflip: float = 0.0,
        rotation: float = 0.0,
        scale: tuple[float, float] | None = None,
        crop: tuple[int, int] | None = None,
        jitter: float = 0.0,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        for name, value, largest in (
            ("hflip", hflip, 1.0),
            ("vflip", vflip, 1.0),
            ("rotation", rotation, _MAX_ROTATION),
            ("jitter", jitter, 1.0),
        ):
            if not 0 <= value <= largest:
                raise ValueError(f"{name} must be in [0, {largest:g}], but it is {value}")
        if scale is not None and not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale must be two positive numbers (least, largest), but it is {scale}")
        if crop is not None and min(crop) < 1:
            raise ValueError(f"crop must be two positive numbers (height, width), but it is {crop}")
        self.ignore_index = ignore_index
        self.scale, self.crop = scale, crop
        steps: list[GeometricAugmentationBase2D | ColorJitter] = []
        if hflip > 0:
            steps.append(RandomHorizontalFlip(p=hflip))
        if vflip > 0:
            steps.append(RandomVerticalFlip(p=vflip))
        if rotation > 0:
            steps.append(RandomRotation(degrees=(-rotation, rotation), resample="bilinear", align_corners=True, p=1.0))
        if jitter > 0:
            steps.append(ColorJitter(jitter, jitter, jitter, jitter / _HUE_SHARE, p=1.0))
        # Said for the mask too: kornia 0.8 samples masks on another grid than images otherwise.
        mask_options = {DataKey.MASK: {"resample": Resample.NEAREST, "align_corners": True}}
        self.steps = (
            AugmentationSequential(*steps, data_keys=["input", "mask"], extra_args=mask_options) if steps else None
        )

    def forward(self, images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Transform a batch.

        Args:
            images: Floating point, shape (N, 3, H, W), in 0..1.
            masks: Integer, shape (N, H, W).

        Returns:
            The transformed images and masks, in the shapes and dtypes of the inputs.

        Raises:
            TypeError: ``images`` is not floating point or ``masks`` is not integer.
            ValueError: The shapes don't go together, or the dtype of ``masks`` can't hold ``ignore_index``.
        """
        self._check(images, masks)
        if len(images) == 0 or (self.steps is None and self.scale is None and self.crop is None):
            return images, masks
        # Kornia fills with zeros: counted from ignore_index, a zero is the ignored label. float32 is exact to 2^24.
        shifted = (masks.to(torch.int32) - self.ignore_index).to(torch.float32)
        shifted = shifted.unsqueeze(1)
        if self.steps is not None:
            images, shifted = self.steps(images, shifted)
        if self.scale is not None or self.crop is not None:
            images, shifted = self._scale_and_crop(images, shifted)
        return images, (shifted.squeeze(1).to(torch.int32) + self.ignore_index).to(masks.dtype)

    def _scale_and_crop(self, images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and crop in one sampling: kornia's crops don't shrink images, its affine maps keep to the middle."""
        size = torch.tensor(images.shape[-2:], dtype=torch.float32)
        crop = size if self.crop is None else torch.tensor(self.crop, dtype=torch.float32)
        least, largest = self.scale or (1.0, 1.0)
        factors = least + (largest - least) * torch.rand(len(images), 1)  # [N, 1]
        window = crop / (factors * size)  # the crop's size in the image's, [N, (y, x)]
        # The middle of the window: from its place at one edge to that at the other, in the image's half sizes.
        middle = (1 - window) * (2 * torch.rand(len(images), 2) - 1)
        maps = torch.diag_embed(window.flip(1))  # torch's maps take (x, y)
        maps = torch.cat([maps, middle.flip(1).unsqueeze(2)], dim=2).to(images)  # [N, 2, 3]
        grid = F.affine_grid(maps, [len(images), 1, *map(int, crop)], align_corners=False)
        bilinear = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        nearest = F.grid_sample(masks, grid.to(masks), mode="nearest", padding_mode="zeros", align_corners=False)
        return bilinear, nearest

    def _check(self, images: Tensor, masks: Tensor) -> None:
        if not images.is_floating_point():
            raise TypeError(f"images must be floating point in 0..1, but they are {images.dtype}")
        if masks.is_floating_point() or masks.dtype == torch.bool:
            raise TypeError(f"masks must be integer, but they are {masks.dtype}")
        if images.ndim != 4 or masks.shape != (images.shape[0], *images.shape[2:]):
            raise ValueError(
                f"images must be (N, C, H, W) and masks (N, H, W), "
                f"but they are {tuple(images.shape)} and {tuple(masks.shape)}"
            )
        limits = torch.iinfo(masks.dtype)
        if not limits.min <= self.ignore_index <= limits.max:
            raise ValueError(f"masks of {masks.dtype} can't hold ignore_index {self.ignore_index}")


class Normalize(nn.Module):
    """Subtract a mean and divide by a standard deviation, channel by channel: ``(images - mean) / std``.

    ``mean`` and ``std`` are buffers, so that they move with ``.to(device)``; they are not part of the state_dict.

    Args:
        mean: Mean of each channel, of images in 0..1.
        std: Standard deviation of each channel, positive.

    Raises:
        ValueError: The two differ in length or a deviation is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> None:
        super().__init__()
        if len(mean) != len(std):
            raise ValueError(f"mean and std must have the same length, but they have {len(mean)} and {len(std)}")
        if not all(value > 0 for value in std):
            raise ValueError(f"std must be positive, but it is {tuple(std)}")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalise images.

        Args:
            images: uint8 in 0..255 or floating point in 0..1, shape (..., C, H, W).

        Returns:
            float32, the shape of ``images``.

        Raises:
            TypeError: ``images`` is neither uint8 nor floating point.
            ValueError: ``images`` doesn't have a channel for each mean.
        """
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise TypeError(f"images must be uint8 or floating point, but they are {images.dtype}")
        if images.ndim < 3 or images.shape[-3] != len(self.mean):
            raise ValueError(f"images must be (..., {len(self.mean)}, H, W), but their shape is {tuple(images.shape)}")
        scaled = images.to(torch.float32)
        if images.dtype == torch.uint8:
            scaled = scaled / 255
        return (scaled - self.mean) / self.std

"""Convolutions, normalisation, ReLU and pools as networks write them, and the operators that they become."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg.testing import make
from tests.fusion.cases import PIXELS, Case


def images(dtype: torch.dtype, layout: str, *, channels: int = 4, groups: int = 1) -> list[Tensor | None]:
    """Images, a convolution's weight and bias."""
    return [
        make((2, channels, 13, 18), dtype, seed=1, layout=layout, requires_grad=True),
        make((8, channels // groups, 3, 3), dtype, seed=2, requires_grad=True),
        make((8,), dtype, seed=3, requires_grad=True),
    ]


def normalised(dtype: torch.dtype, layout: str) -> list[Tensor | None]:
    """The same, and what batch normalisation needs."""
    return [
        *images(dtype, layout),
        make((8,), dtype, seed=4),
        make((8,), dtype, seed=5).abs() + 0.5,
        make((8,), dtype, seed=6, requires_grad=True),
        make((8,), dtype, seed=7, requires_grad=True),
    ]


def conv_in_place(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(F.conv2d(x, weight, bias, padding=1), inplace=True), 2)


def conv_methods(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.max_pool2d(torch.conv2d(x, weight, bias).relu_(), 3, stride=2, padding=1, ceil_mode=True)


def conv_pool_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.relu(F.max_pool2d(F.conv2d(x, weight, bias, padding="same"), kernel_size=(2, 3)))


def conv_indices(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    output, positions = F.max_pool2d(F.relu(F.conv2d(x, weight, None, 2, 1)), 3, 2, 1, return_indices=True)
    return output * bias[:, None, None], positions


def conv_skip_indices(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    skip = F.relu(F.conv2d(x, weight, bias, padding=1))
    output, positions = F.max_pool2d_with_indices(skip, 2)
    return output, positions, skip


def conv_skip_early(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The skip is used before the pool."""
    skip = F.relu(F.conv2d(x, weight, bias, padding=1))
    other = skip.sin()
    return F.max_pool2d(skip, 2), other


def conv_two_pools(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """One of the pools is fused, the other reads the skip."""
    skip = F.relu(F.conv2d(x, weight, bias, padding=1))
    return F.max_pool2d(skip, 2), F.max_pool2d(skip, 3)


def conv_grouped(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(F.conv2d(x, weight, bias, dilation=2, groups=2)), 2, dilation=1)


def conv_unbatched(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(F.conv2d(x[0].contiguous(), weight, bias)), 2)


def two_convs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What the first replacement gives is what the second takes."""
    first = F.max_pool2d(F.relu(F.conv2d(x, weight, bias, padding=1)), 2)
    return F.max_pool2d(F.relu(F.conv2d(first[:, :4] * 1.0, weight, bias, padding=1)), 2)


def chained_convs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    first = F.max_pool2d(F.relu(F.conv2d(x, weight, bias, padding=1)), 2)
    return F.max_pool2d(F.relu(F.conv2d(first, weight.repeat(1, 2, 1, 1), bias, padding=1)), 2)


def norm_relu_pool(x: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(F.batch_norm(F.conv2d(x, weight, bias, padding=1), *norm), inplace=True), 2)


def norm_pool_relu(x: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> Tensor:
    return F.relu(F.max_pool2d(F.batch_norm(F.conv2d(x, weight, bias, padding=1), *norm, eps=1e-2), 2))


def norm_skip(x: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> tuple[Tensor, Tensor]:
    skip = F.relu(F.batch_norm(F.conv2d(x, weight, None, padding=1), *norm))
    return F.max_pool2d(skip, 3, 2, 1) * bias[:, None, None], skip


def norm_not_affine(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(F.batch_norm(F.conv2d(x, weight, bias, padding=1), mean, var)), 2)


def norm_in_training(x: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> Tensor:
    """The stem of a ResNet: no convolution can take in batch normalisation that needs the whole map."""
    normal = F.batch_norm(F.conv2d(x, weight, padding=1), None, None, *norm[2:], training=True)
    return F.max_pool2d(F.relu(normal, inplace=True), 3, 2, 1) * bias[:, None, None]


def norm_in_training_skip(x: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> tuple[Tensor, Tensor]:
    normal = F.batch_norm(F.conv2d(x, weight, padding=1), None, None, *norm[2:], training=True)
    skip = F.relu(normal)
    other = skip.sin()
    return F.max_pool2d(skip, 2) * bias[:, None, None], other


def pool_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.max_pool2d(torch.tanh(x), 3, 2, ceil_mode=True).relu_() * weight.sum() * bias.sum()


def relu_pool_indices(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    skip = F.relu(x)  # an input, which isn't written to
    output, positions = F.max_pool2d(skip, 2, return_indices=True)
    return output * weight.sum() * bias.sum(), positions, skip


def conv_used_before_relu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    convolved = F.conv2d(x, weight, bias, padding=1)
    return F.max_pool2d(F.relu(convolved), 2), convolved.sin()


def wide_images(dtype: torch.dtype, layout: str) -> list[Tensor | None]:
    """As `images`, with so many channels that Winograd's algorithm serves the convolution without a pool, too."""
    return images(dtype, layout, channels=6)


def wide_normalised(dtype: torch.dtype, layout: str) -> list[Tensor | None]:
    return [*wide_images(dtype, layout), *normalised(dtype, layout)[3:]]


def conv_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.relu(F.conv2d(x, weight, bias, padding="same"), inplace=True)


def norm_relu(x: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> Tensor:
    return torch.relu(F.batch_norm(F.conv2d(x, weight, bias, padding=(1, 2)), *norm))


def conv_relu_dilated_pool(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """A pool that no operator serves, and another user of what is before it."""
    activated = F.relu(F.conv2d(x, weight, bias))
    return F.max_pool2d(activated, 2, dilation=2), activated


def wide_conv_skip(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The pool's pattern takes the convolution, and gives the un-pooled value as well."""
    activated = F.relu(F.conv2d(x, weight, bias))
    return F.max_pool2d(activated, 2), activated.sin()


def conv_alone(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.conv2d(x, weight, bias, padding=1).sin()


def norm_alone(x: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> Tensor:
    return F.batch_norm(F.conv2d(x, weight, bias, padding=1), *norm).sin()


def conv_norm_in_training(x: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> Tensor:
    return F.relu(F.batch_norm(F.conv2d(x, weight, bias, padding=1), None, None, *norm[2:], training=True))


def residual(x: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> Tensor:
    """The second half of a ResNet's block."""
    return F.relu(x.sum(1, keepdim=True) + F.batch_norm(F.conv2d(x, weight, bias, padding=1), *norm), inplace=True)


def wide_conv_used_before_relu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """No ReLU or pool can be taken in; the convolution itself is replaced, and so is what follows."""
    convolved = F.conv2d(x, weight, bias)
    return F.max_pool2d(F.relu(convolved), 2), convolved.sin()


def maps(dtype: torch.dtype, layout: str) -> list[Tensor | None]:
    """So large ones that instance normalisation is worth a call; its weight and bias."""
    return [
        make((2, 8, 64, 66), dtype, seed=1, layout=layout, requires_grad=True),
        make((8,), dtype, seed=2, requires_grad=True),
        make((8,), dtype, seed=3, requires_grad=True),
    ]


def instance_norm_leaky_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As MONAI's blocks: with a dropout that does nothing, and in place."""
    normal = F.instance_norm(x, None, None, weight, bias, True, 0.1, 1e-3)
    return F.leaky_relu(F.dropout(normal, 0.0, True), 0.1, inplace=True)


def instance_norm_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.relu(F.dropout(F.instance_norm(x, weight=weight, bias=bias), 0.5, training=False))


def instance_norm_alone(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """What follows isn't taken in: the normalised map is used elsewhere, too."""
    normal = F.instance_norm(x, eps=1e-3)
    return F.leaky_relu(normal, 0.2) * weight.sum(), normal.sin() * bias.sum()


def padded_by_nothing(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.cat([F.pad(x, (0, 0, 0, 0), "replicate"), F.pad(x.sin(), [0, 0])], 1) * weight.sum() + bias.sum()


def wide_norm_used_before_relu(x: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> tuple[Tensor, Tensor]:
    normal = F.batch_norm(F.conv2d(x, weight, bias), *norm)
    return F.relu(normal), normal.sin()


CASES = {
    "conv, in place": Case(conv_in_place, images, ("conv_relu_pool2d",), PIXELS),
    "conv, methods": Case(conv_methods, images, ("conv_relu_pool2d",), PIXELS),
    "conv, pool before relu": Case(conv_pool_relu, images, ("conv_relu_pool2d",), PIXELS),
    "conv, indices": Case(conv_indices, images, ("conv_relu_pool2d",), PIXELS),
    "conv, skip and indices": Case(conv_skip_indices, images, ("conv_relu_pool2d",), PIXELS),
    "conv, skip used first": Case(conv_skip_early, images, ("conv_relu_pool2d",), PIXELS),
    "conv, two pools": Case(conv_two_pools, images, ("conv_relu_pool2d",), PIXELS),
    "conv, groups": Case(conv_grouped, lambda d, f: images(d, f, groups=2), ("conv_relu_pool2d",), PIXELS),
    "conv, no batch": Case(conv_unbatched, images, ("conv_relu_pool2d",), PIXELS),
    "conv, two": Case(two_convs, images, ("conv_relu_pool2d",) * 2, PIXELS),
    "conv, chained": Case(chained_convs, images, ("conv_relu_pool2d",) * 2, PIXELS),
    "norm": Case(norm_relu_pool, normalised, ("conv_relu_pool2d",), PIXELS),
    "norm, pool before relu": Case(norm_pool_relu, normalised, ("conv_relu_pool2d",), PIXELS),
    "norm, skip": Case(norm_skip, normalised, ("conv_relu_pool2d",), PIXELS),
    "norm, not affine": Case(norm_not_affine, lambda d, f: normalised(d, f)[:5], ("conv_relu_pool2d",), PIXELS),
    "conv, used before relu": Case(conv_used_before_relu, images, ("relu_pool2d",), PIXELS),
    "norm in training": Case(norm_in_training, normalised, ("relu_pool2d",), PIXELS),
    "norm in training, skip used first": Case(norm_in_training_skip, normalised, ("relu_pool2d",), PIXELS),
    "pool before relu": Case(pool_relu, images, ("relu_pool2d",), PIXELS),
    "relu, pool with indices": Case(relu_pool_indices, images, ("relu_pool2d",), PIXELS),
    "no pool": Case(conv_relu, wide_images, ("conv_relu_pool2d",), PIXELS),
    "no pool, norm": Case(norm_relu, wide_normalised, ("conv_relu_pool2d",), PIXELS),
    "no pool that is served": Case(conv_relu_dilated_pool, wide_images, ("conv_relu_pool2d",), PIXELS),
    "conv, wide, skip": Case(wide_conv_skip, wide_images, ("conv_relu_pool2d",), PIXELS),
    "conv alone": Case(conv_alone, wide_images, ("conv2d",), PIXELS),
    "norm alone": Case(norm_alone, wide_normalised, ("conv2d",), PIXELS),
    "norm alone, in training": Case(conv_norm_in_training, wide_normalised, ("conv2d",), PIXELS),
    "norm and sum": Case(residual, wide_normalised, ("conv2d",), PIXELS),
    "conv, wide, used before relu": Case(wide_conv_used_before_relu, wide_images, ("conv2d", "relu_pool2d"), PIXELS),
    "instance norm, leaky relu": Case(instance_norm_leaky_relu, maps, ("instance_norm",), 2 * 64 * 66),
    "instance norm, relu": Case(instance_norm_relu, maps, ("instance_norm",), 2 * 64 * 66),
    "instance norm alone": Case(instance_norm_alone, maps, ("instance_norm",), 2 * 64 * 66),
    "pad by nothing": Case(padded_by_nothing, images, ("clone", "clone"), PIXELS),
    "norm, wide, used before relu": Case(wide_norm_used_before_relu, wide_normalised, ("conv2d",), PIXELS),
}

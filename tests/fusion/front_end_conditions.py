"""What looks like a pattern of convolutions, normalisation, ReLU and pools and must stay: each with its reason."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.fusion.cases import Left, left_as_it_is
from tests.fusion.front_end_cases import conv_in_place, images, normalised

LEFT: dict[str, Left] = {}
left = partial(left_as_it_is, LEFT)


@left(images, "dilation")
def dilated_pool(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(F.conv2d(x, weight, bias)), 2, dilation=2)


@left(images, "more than 255 positions")
def large_window(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(F.conv2d(x, weight, bias, padding=8)), 16)


@left(images, "conv2d (convolved) has another user", "relu_pool2d")
def convolution_used_elsewhere(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    convolved = F.conv2d(x, weight, bias)
    return F.max_pool2d(F.relu(convolved), 2), convolved.sin()


@left(images, "max_pool2d (pooled) has another user")
def pool_used_before_relu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    pooled = F.max_pool2d(F.conv2d(x, weight, bias), 2)
    return F.relu(pooled), pooled.sin()


@left(images, "dilation")
def dilated_pool_alone(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(x.sin()), 2, dilation=2) * weight.sum() * bias.sum()


@left(images, "relu in place: shifted is used elsewhere")
def overwritten_and_used(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    shifted = x + weight.sum() + bias.sum()
    return F.max_pool2d(F.relu(shifted, inplace=True), 2), shifted.sin()


@left(images, "relu in place: getitem is part of another value")
def overwritten_part(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    shifted = x + weight.sum() + bias.sum()
    return F.max_pool2d(shifted[:, :2].relu_(), 2), shifted


@left(images, "relu in place: it changes what isn't the graph's own")
def overwritten_input(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    with torch.no_grad():
        return F.max_pool2d(F.relu(x, inplace=True), 2)


@left(images, "changes a value in place")
def activation_changed_before_the_pool(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    with torch.no_grad():
        activated = F.relu(x.sin())
        activated[:, 0].add_(1.0)
        return F.max_pool2d(activated, 2)


@left(normalised, "batch_norm (normal) has another user", "relu_pool2d")
def norm_used_elsewhere(x: Tensor, weight: Tensor, bias: Tensor, *norm: Tensor) -> tuple[Tensor, Tensor]:
    normal = F.batch_norm(F.conv2d(x, weight, bias), *norm)
    return F.max_pool2d(F.relu(normal), 2), normal.sin()


@left(images, "changes a value in place")
def skip_changed_before_the_pool(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    with torch.no_grad():  # or else autograd itself refuses it
        skip = F.relu(F.conv2d(x, weight, bias))
        skip[:, 0].add_(1.0)
        return F.max_pool2d(skip, 2)


@left(images, "changes a value in place", "relu_pool2d")
def input_changed_on_the_way(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        shifted = x + 1
    convolved = F.conv2d(shifted, weight.detach(), bias.detach())
    shifted += 1
    return F.max_pool2d(F.relu(convolved), 2) * bias[:, None, None], shifted * weight.sum() * x


@left(images, "changes a value in place", "relu_pool2d")
def weight_changed_on_the_way(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    with torch.no_grad():
        moving = weight.clone()
        convolved = F.conv2d(x, moving, bias)
        moving[0] = 0
        return F.max_pool2d(F.relu(convolved), 2)


@left(images, "autograd's or autocast's state", "relu_pool2d")
def convolution_without_gradient(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    with torch.no_grad():
        convolved = F.conv2d(x, weight, bias)
    return F.max_pool2d(F.relu(convolved), 2) * bias[:, None, None] * weight.sum() * x.sum()


@left(images, "autograd's or autocast's state", "relu_pool2d")
def convolution_in_autocast(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        convolved = F.conv2d(x, weight, bias)
    return F.max_pool2d(F.relu(convolved), 2)


@left(lambda dtype, layout: images(torch.bfloat16, layout), "in half types", "relu_pool2d")
def indices_in_bfloat16(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return F.max_pool2d(F.relu(F.conv2d(x, weight, bias)), 2, return_indices=True)


@left(lambda dtype, layout: images(dtype, "channels_last"), "strides", "relu_pool2d")
def unbatched_channels_last(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(F.conv2d(x[0], weight, bias)), 2)


@left(images, "torch.func")
def mapped(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.func.vmap(lambda image: conv_in_place(image[None], weight, bias))(x)

"""The losses' Triton kernels on labels outside the classes: a GPU can't raise, so the loss says it."""

from typing import Any

import pytest
import torch

from fastseg import functional, reference
from fastseg._native import INTERPRETED
from tests.ops import upsample_cases
from tests.ops.cross_entropy_cases import labels_for, logits

OUTSIDE = {"too-large": (21, torch.int64), "255": (255, torch.uint8), "negative": (-1, torch.int16),
           "far": (2**62, torch.int64), "far-negative": (-(2**31), torch.int32)}  # fmt: skip


@pytest.fixture(autouse=True)
def triton_runs() -> None:
    if not INTERPRETED and torch.get_default_device().type == "cpu":
        pytest.skip("the C++ kernels run here, which raise an IndexError")


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("weight", [None, torch.rand(21)], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("label", "dtype"), OUTSIDE.values(), ids=OUTSIDE)
def test_label_outside_the_classes_gives_nan_there_alone(
    label: int, dtype: torch.dtype, smoothing: float, weight: torch.Tensor | None, layout: str
) -> None:
    input = logits((2, 21, 5, 7), layout=layout)
    target = labels_for(input, dtype)
    target[1, 2, 3] = label
    options = {"weight": weight, "label_smoothing": smoothing}
    loss = functional.cross_entropy(input, target, reduction="none", **options)
    (gradient,) = torch.autograd.grad(loss.sum(), input)
    outside = torch.zeros_like(target, dtype=torch.bool)
    outside[1, 2, 3] = True
    assert torch.equal(loss.isnan(), outside)
    assert torch.equal(gradient.isnan(), outside.unsqueeze(1).expand_as(gradient))
    assert functional.cross_entropy(input, target, **options).isnan()


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mode", upsample_cases.MODES.values(), ids=upsample_cases.MODES)
@pytest.mark.parametrize(("label", "dtype"), OUTSIDE.values(), ids=OUTSIDE)
def test_label_outside_the_classes_gives_nan_where_its_pixel_reads(
    label: int, dtype: torch.dtype, mode: dict[str, Any], smoothing: float, layout: str
) -> None:
    input = logits((2, 21, 4, 5), layout=layout)
    target = upsample_cases.labels_for(input, (9, 13), dtype)
    target[1, 4, 7] = label
    options = {"weight": torch.rand(21), "label_smoothing": smoothing, **mode}
    loss = functional.upsample_cross_entropy(input, target, reduction="none", **options)
    (gradient,) = torch.autograd.grad(loss.sum(), input)
    outside = torch.zeros_like(target, dtype=torch.bool)
    outside[1, 4, 7] = True
    assert torch.equal(loss.isnan(), outside)
    leaf = input.detach().requires_grad_()
    upsampled = reference.upsample(leaf, (9, 13), None, mode.get("mode", "bilinear"), mode.get("align_corners", False))
    (read,) = torch.autograd.grad(upsampled, leaf, outside.unsqueeze(1).expand_as(upsampled).float())
    assert torch.equal(gradient.isnan(), read != 0)
    assert functional.upsample_cross_entropy(input, target, **options).isnan()

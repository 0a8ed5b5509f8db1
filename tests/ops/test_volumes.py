"""What GPUs' kernels are given of volumes, and what becomes of the gradients that they give back; on CPUs, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg import reference
from fastseg.ops import volumes
from fastseg.ops.upsampling import Upsampling, upsampling_between
from fastseg.testing import make
from tests.ops.upsample_cases import VOLUME_GRIDS, VOLUME_MODES, Size

each_grid = pytest.mark.parametrize(("before", "after"), VOLUME_GRIDS.values(), ids=VOLUME_GRIDS)
each_mode = pytest.mark.parametrize("mode", VOLUME_MODES.values(), ids=VOLUME_MODES)


def slabs_of(
    before: Size, after: Size, mode: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, Upsampling]:
    """Volumes, whose slabs are two planes thick, and the grid."""
    input = make((2, 3, *before), torch.float64)
    monkeypatch.setattr(volumes, "SLAB_BYTES", 2 * input[0, :, 0].nbytes)
    return input, upsampling_between(before, after, mode["mode"], mode.get("align_corners", False))


@each_grid
@each_mode
def test_slabs_are_upsampled_to_the_volume(
    monkeypatch: pytest.MonkeyPatch, mode: dict[str, Any], before: Size, after: Size
) -> None:
    input, upsampling = slabs_of(before, after, mode, monkeypatch)
    expected = reference.upsample(input, after, None, mode["mode"], mode.get("align_corners", False))
    of_images = ("nearest", None) if mode["mode"] == "nearest" else ("bilinear", upsampling.align_corners)
    actual = torch.full_like(expected, torch.nan)
    for slab in volumes.slabs(input, after, upsampling):
        assert len(slab.logits) <= 2
        image, planes = slab.at
        actual[image, :, planes] = F.interpolate(slab.logits, after[1:], None, *of_images).movedim(0, 1)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)  # torch takes positions to float32


@each_grid
@each_mode
def test_gradients_go_back_to_the_planes_that_slabs_came_of(
    monkeypatch: pytest.MonkeyPatch, mode: dict[str, Any], before: Size, after: Size
) -> None:
    input, upsampling = slabs_of(before, after, mode, monkeypatch)
    leaf = input.clone().requires_grad_()
    slabs = list(volumes.slabs(leaf, after, upsampling))
    given = [make(slab.logits.shape, torch.float64, seed=number) for number, slab in enumerate(slabs)]
    (expected,) = torch.autograd.grad([slab.logits for slab in slabs], leaf, given)
    gradients = iter(given)
    actual = volumes.sum_gradients(input, after, upsampling, lambda slab: next(gradients))
    torch.testing.assert_close(actual, expected)


def test_no_volumes() -> None:
    input, upsampling = make((0, 3, 2, 4, 5)), upsampling_between((2, 4, 5), (3, 8, 10), "trilinear", False)
    assert list(volumes.slabs(input, (3, 8, 10), upsampling)) == []
    assert volumes.sum_gradients(input, (3, 8, 10), upsampling, lambda slab: slab.logits).shape == input.shape

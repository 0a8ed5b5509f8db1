"""Which road conv_relu_pool2d takes, and that torch's settings of TF32 reach it."""

from contextlib import AbstractContextManager

import pytest
import torch

from fastseg._tf32 import convolutions_take_tf32
from fastseg.ops.conv_relu_pool2d_geometry import Geometry, resolve
from fastseg.ops.conv_relu_pool2d_roads import (
    DIRECT_BACKWARD_MAX_TAPS,
    DIRECT_FORWARD_MAX_TAPS,
    GPU_DIRECT_MAX_TAPS,
    GPU_DIRECT_MAX_TAPS_WITHOUT_TENSOR_CORES,
    choose_gpu_road,
    choose_road,
)


def tf32(allowed: bool) -> AbstractContextManager[None]:
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=allowed)


@pytest.mark.parametrize("allowed", [True, False])
def test_old_flag(allowed: bool) -> None:
    with tf32(allowed):
        assert convolutions_take_tf32() == allowed


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="this torch has the old flag alone")
@pytest.mark.parametrize(("precision", "expected"), [("tf32", True), ("ieee", False)])
def test_new_setting_which_the_old_flag_refuses_to_tell(
    precision: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends, "flags_frozen", lambda: False)  # torch's own test harness freezes them
    with tf32(True):
        torch.backends.cudnn.conv.fp32_precision = precision
        assert convolutions_take_tf32() == expected
        torch.backends.cudnn.conv.fp32_precision = "tf32"  # the context asks the old flag at its end


def geometry(stride: int = 1, padding: int = 0, groups: int = 1, pool: tuple = (2, 2, 0)) -> Geometry:
    return resolve((1, 1), stride, padding, 1, groups, *pool, False)[0]


def weight(taps: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(8, taps, 1, 1, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("allowed", [True, False], ids=["tf32", "ieee"])
def test_more_taps_go_directly_on_tensor_cores(allowed: bool, dtype: torch.dtype) -> None:
    tensor_cores = allowed or dtype != torch.float32
    most = GPU_DIRECT_MAX_TAPS if tensor_cores else GPU_DIRECT_MAX_TAPS_WITHOUT_TENSOR_CORES
    with tf32(allowed):
        assert choose_gpu_road(weight(most, dtype), geometry(), False) == "direct"
        assert choose_gpu_road(weight(most + 1, dtype), geometry(), False) == "library"


@pytest.mark.parametrize("most", [DIRECT_FORWARD_MAX_TAPS, DIRECT_BACKWARD_MAX_TAPS], ids=["forward", "backward"])
def test_taps_decide_on_a_cpu(most: int) -> None:
    assert choose_road(weight(most, torch.float32), 1, False, most) == "direct"
    assert choose_road(weight(most + 1, torch.float32), 1, False, most) == "library"


def test_what_the_direct_kernels_do_not_serve_goes_by_the_library() -> None:
    assert choose_road(weight(8, torch.float32), 2, False, DIRECT_BACKWARD_MAX_TAPS) == "library"  # groups
    assert choose_road(weight(8, torch.float32), 1, True, DIRECT_BACKWARD_MAX_TAPS) == "library"  # a skip
    assert choose_gpu_road(weight(8, torch.bfloat16), geometry(groups=2), False) == "library"
    assert choose_gpu_road(weight(8, torch.bfloat16), geometry(), True) == "library"  # a skip
    assert choose_gpu_road(weight(8, torch.float64), geometry(), False) == "library"


def test_overlapping_windows_go_by_the_library_on_a_gpu() -> None:
    stem = torch.empty(64, 3, 7, 7, dtype=torch.bfloat16)  # few enough taps
    assert choose_gpu_road(stem, geometry(stride=2, padding=3), False) == "direct"
    assert choose_gpu_road(stem, geometry(stride=2, padding=3, pool=(3, 2, 1)), False) == "library"
    assert choose_gpu_road(stem, geometry(pool=((1, 2), (1, 1), 0)), False) == "library"

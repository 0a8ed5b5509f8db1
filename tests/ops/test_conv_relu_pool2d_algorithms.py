"""Which algorithm serves a call of conv_relu_pool2d, and that torch's settings of TF32 reach it."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastseg import functional, reference
from fastseg._tf32 import convolutions_take_tf32
from fastseg.ops.convolution import convolve
from fastseg.ops.convolution.algorithms import (
    DIRECT_BACKWARD_MAX_TAPS,
    DIRECT_FORWARD_MAX_TAPS,
    GPU_DIRECT_MAX_TAPS,
    GPU_DIRECT_MAX_TAPS_WITHOUT_TENSOR_CORES,
    choose_cpu_backward,
    choose_cpu_forward,
    choose_gpu_backward,
    choose_gpu_forward,
)
from fastseg.ops.convolution.geometry import Geometry, resolve
from fastseg.testing import assert_parity, make, values_and_gradients


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
        assert choose_gpu_backward(weight(most, dtype), geometry(), False) == "direct"
        assert choose_gpu_backward(weight(most + 1, dtype), geometry(), False) == "library"


CPU = {
    "forward": (choose_cpu_forward, DIRECT_FORWARD_MAX_TAPS),
    "backward": (choose_cpu_backward, DIRECT_BACKWARD_MAX_TAPS),
}


def on_cpu(choose: Callable[..., str], taps: int, with_skip: bool = False, groups: int = 1) -> str:
    return choose(torch.empty(1, taps * groups, 8, 8), weight(taps, torch.float32), geometry(groups=groups), with_skip)


@pytest.mark.parametrize(("choose", "most"), CPU.values(), ids=CPU)
def test_taps_decide_on_a_cpu(choose: Callable[..., str], most: int) -> None:
    assert on_cpu(choose, most) == "direct"
    assert on_cpu(choose, most + 1) == "library"


@pytest.mark.parametrize("choose", [choose_cpu_forward, choose_cpu_backward])
def test_what_the_direct_kernels_do_not_serve_goes_to_the_library_on_a_cpu(choose: Callable[..., str]) -> None:
    assert on_cpu(choose, 8, groups=2) == "library"
    assert on_cpu(choose, 8, with_skip=True) == "library"


@pytest.mark.parametrize("choose_gpu", [choose_gpu_forward, choose_gpu_backward])
def test_what_the_direct_kernels_do_not_serve_goes_to_the_library_on_a_gpu(choose_gpu: Callable[..., str]) -> None:
    assert choose_gpu(weight(8, torch.bfloat16), geometry(groups=2), False) == "library"
    assert choose_gpu(weight(8, torch.bfloat16), geometry(), True) == "library"  # a skip
    assert choose_gpu(weight(8, torch.float64), geometry(), False) == "library"


# Weight, pool and the algorithm of a call in half types: fields of up to 64 numbers under windows of four positions.
FIELDS = {
    "rgb": ((20, 3, 3, 3), (2, 2, 0), "fields"),
    "largest": ((20, 4, 3, 3), (2, 2, 0), "fields"),
    "large": ((20, 5, 3, 3), (2, 2, 0), "direct"),
    "nine-positions": ((20, 1, 3, 3), (3, 3, 0), "direct"),
}


@pytest.mark.parametrize(("shape", "pool", "algorithm"), FIELDS.values(), ids=FIELDS)
def test_small_fields_have_a_kernel_of_their_own_on_tensor_cores(
    shape: tuple[int, ...], pool: tuple, algorithm: str
) -> None:
    assert choose_gpu_forward(torch.empty(shape, dtype=torch.bfloat16), geometry(pool=pool), False) == algorithm
    with tf32(False):
        assert choose_gpu_forward(torch.empty(shape), geometry(pool=pool), False) == "direct"


def test_overlapping_windows_go_to_the_library_on_a_gpu() -> None:
    stem = torch.empty(64, 3, 7, 7, dtype=torch.bfloat16)  # few enough taps
    assert choose_gpu_backward(stem, geometry(stride=2, padding=3), False) == "direct"
    assert choose_gpu_backward(stem, geometry(stride=2, padding=3, pool=(3, 2, 1)), False) == "library"
    assert choose_gpu_backward(stem, geometry(pool=((1, 2), (1, 1), 0)), False) == "library"


def test_an_input_is_copied_for_the_library_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it multiplies on tensor cores."""
    monkeypatch.setattr(convolve, "INTERPRETED", True)
    monkeypatch.setattr(convolve._triton, "kernels", lambda *names: None)

    def copied(dtype: torch.dtype, groups: int = 1) -> bool:
        input = torch.rand(2, 3, 5, 6).to(dtype)
        source = convolve.for_library(input, groups)
        torch.testing.assert_close(source, input, rtol=0, atol=0)
        assert convolve.for_library(source, groups) is source
        assert source.is_contiguous(memory_format=torch.channels_last) is (source is not input)
        return source is not input

    assert copied(torch.bfloat16)
    assert not copied(torch.float16, groups=3)
    for takes_tf32 in (False, True):
        with tf32(takes_tf32):
            assert copied(torch.float32) is takes_tf32


# Numbers that C++ multiplies, and torch takes: those of a pool up to 2^31 - 1 alone.
HUGE: dict[str, dict[str, Any]] = {
    "stride": {"stride": 2**63 - 1},
    "stride-and-padding": {"stride": 1000, "padding": 1000},
    "stride-of-rows": {"stride": (10**7, 1)},
    "dilation": {"stride": 10**7, "padding": 10**7, "dilation": 10**7},
    "largest": {"stride": 2**31 - 1, "padding": 2**31 - 1, "dilation": 2**31 - 1},
    "pool-stride": {"pool_size": 2, "pool_stride": 2**31 - 1},
    "pool-stride-of-columns": {"pool_size": 3, "pool_stride": (2, 10**7), "pool_padding": 1, "ceil_mode": True},
}


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("options", HUGE.values(), ids=HUGE)
def test_huge_numbers_equal_torch(options: dict[str, Any], layout: str) -> None:
    arguments = [
        make((2, 5, 20, 23), layout=layout, requires_grad=True), make((4, 5, 3, 3), seed=1, requires_grad=True)
    ]  # fmt: skip

    def plain(input: torch.Tensor, weight: torch.Tensor, pool_size: int = 1, **options: Any) -> torch.Tensor:
        pool = {
            name: options.pop(name) for name in list(options) if name in ("pool_stride", "pool_padding", "ceil_mode")
        }
        convolved = F.conv2d(input, weight, **options).relu()
        names = {"pool_stride": "stride", "pool_padding": "padding", "ceil_mode": "ceil_mode"}
        return F.max_pool2d(convolved, pool_size, **{names[name]: value for name, value in pool.items()})

    actual = values_and_gradients(functional.conv_relu_pool2d, arguments, **{"pool_size": 1, **options})
    torch.testing.assert_close(actual, values_and_gradients(plain, arguments, **options))


@pytest.mark.parametrize("name", ["padding", "dilation"])
def test_numbers_past_32_bits_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected at most 2147483647 pixels, got"):
        functional.conv_relu_pool2d(torch.zeros(1, 1, 9, 9), torch.zeros(1, 1, 2, 2), **{name: 2**31})


def test_rows_that_would_mostly_be_skipped_are_not_packed() -> None:
    input, kernel = torch.empty(1, 16, 400, 4000, device="meta"), torch.empty(8, 16, 3, 3)
    for stride, algorithm in ((2, "direct"), (300, "library")):
        numbers = resolve((3, 3), stride, 1, 1, 1, 2, None, 0, False)[0]
        for choose in (choose_cpu_forward, choose_cpu_backward):
            assert choose(input, kernel, numbers, False) == algorithm


@pytest.mark.parametrize("return_skip", [False, True])
def test_taps_that_see_nothing_but_padding_are_left_out(return_skip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    convolved, library_backward = [], convolve.library_backward

    def spy(grad_output: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, *rest: Any) -> convolve.Gradients:
        convolved.append(tuple(weight.shape[2:]))
        return library_backward(grad_output, input, weight, *rest)

    monkeypatch.setattr(convolve, "library_backward", spy)
    called = [make((2, 64, 9, 10)), make((24, 64, 3, 3), seed=1, scale=0.1), make((24,), seed=2)]
    options = {"padding": (11, 3), "dilation": (11, 3), "return_skip": return_skip}
    results = [
        values_and_gradients(of.conv_relu_pool2d, [t.requires_grad_() for t in called], dtype, **options)
        for of, dtype in ((functional, None), (reference, None), (reference, torch.float64))
    ]
    assert_parity(*results, terms=64 * 9)
    assert convolved == ([(1, 3)] if return_skip else [])  # without a skip, the gradient is sparse, and kernels' own

"""The operators on a CUDA device: the parity suites there, and what only a GPU shows.

Graphs, streams, other devices, synchronisation; memory and large sizes: test_cuda_memory.py. Each test needs a device;
without one it is skipped.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastseg import functional, reference
from fastseg.ops.convolution.geometry import flatten, resolve
from fastseg.testing import assert_parity, make, make_labels, values_and_gradients
from tests.kernels.poison import fresh_memory_of_nan

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")

PARITY = {
    "cross_entropy": ["ops/test_cross_entropy.py", "kernels/test_labels.py"],
    "upsample_cross_entropy": ["ops/test_upsample_cross_entropy.py"],
    "upsample_argmax": ["ops/test_upsample_argmax.py"],
    "upsample_confusion_matrix": ["ops/test_upsample_confusion_matrix.py"],
    "upsample_threshold": ["ops/test_upsample_threshold.py"],
    "upsample_mask_argmax": ["ops/test_upsample_mask_argmax.py"],
    "relu_pool2d": ["ops/test_relu_pool2d.py"],
    "conformance": ["ops/test_conformance.py", "ops/test_memory.py"],
    "conv_relu_pool2d-tf32": ["ops/test_conv_relu_pool2d.py", "ops/test_conv_relu_pool2d_fields.py", "--tf32=on"],
    "conv_relu_pool2d-ieee": ["ops/test_conv_relu_pool2d.py", "--tf32=off"],
}


@pytest.mark.parametrize("arguments", PARITY.values(), ids=PARITY)
def test_parity_suite(request: pytest.FixtureRequest, arguments: list[str]) -> None:
    tests = Path(__file__).parents[1]
    files = [tests / argument if argument.endswith(".py") else argument for argument in arguments]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--device=cuda", *files]
    if importlib.util.find_spec("xdist"):  # most of the time goes into compiling
        processes = (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
        command.append(f"--numprocesses={max(processes, 1)}")
    command.append(f"--strength={request.config.getoption('strength')}")
    run = subprocess.run(command, cwd=tests.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


# ---- one call of each operator ----

Call = Callable[..., Tensor]


def conv(
    algorithm: str, layout: str = "channels_last", dtype: torch.dtype = torch.bfloat16
) -> tuple[Call, list[Tensor]]:
    """conv_relu_pool2d by an algorithm, and its tensors: with 16 channels under 3x3 "direct", with 64 "library"."""
    channels = {"fields": 3, "direct": 16, "library": 64}[algorithm]
    shapes = {"input": (2, channels, 40, 56), "weight": (32, channels, 3, 3), "bias": (32,)}
    tensors = [
        make(shapes["input"], dtype, layout=layout).to(CUDA),
        make(shapes["weight"], dtype, seed=1, scale=(9 * channels) ** -0.5).to(CUDA),
        make(shapes["bias"], dtype, seed=2, scale=0.1).to(CUDA),
    ]
    return lambda *t: functional.conv_relu_pool2d(*t, padding=1), [t.requires_grad_() for t in tensors]


def loss(layout: str = "channels_last", dtype: torch.dtype = torch.bfloat16) -> tuple[Call, list[Tensor]]:
    """cross_entropy, and its tensors."""
    logits = make((4, 19, 40, 56), dtype, layout=layout, scale=3.0).to(CUDA).requires_grad_()
    return functional.cross_entropy, [logits, make_labels((4, 40, 56), 19, ignore_index=-100).to(CUDA)]


def upsampled_loss(layout: str = "channels_last", dtype: torch.dtype = torch.bfloat16) -> tuple[Call, list[Tensor]]:
    """upsample_cross_entropy, to four times the rows and an odd multiple of the columns, and its tensors."""
    logits = make((4, 19, 10, 13), dtype, layout=layout, scale=3.0).to(CUDA).requires_grad_()
    return functional.upsample_cross_entropy, [logits, make_labels((4, 40, 56), 19, ignore_index=-100).to(CUDA)]


CALLS = {
    "conv-fields": lambda **o: conv("fields", **o),
    "conv-direct": lambda **o: conv("direct", **o),
    "conv-library": lambda **o: conv("library", **o),
    "cross_entropy": loss,
    "upsample_cross_entropy": upsampled_loss,
    "upsample_cross_entropy_dice": lambda **o: (functional.upsample_cross_entropy_dice, upsampled_loss(**o)[1]),
}
parametrize_calls = pytest.mark.parametrize("make_call", CALLS.values(), ids=CALLS)


def results(function: Call, tensors: list[Tensor]) -> list[Tensor]:
    """The output, then the gradients of the tensors that require any."""
    output = function(*tensors)
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    return [output.detach(), *torch.autograd.grad(output.float().square().sum(), wanted)]


@parametrize_calls
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_twice_the_same_bits(
    make_call: Callable[..., tuple[Call, list[Tensor]]], dtype: torch.dtype, layout: str
) -> None:
    function, tensors = make_call(layout=layout, dtype=dtype)
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True  # the library's part
    try:
        torch.testing.assert_close(results(function, tensors), results(function, tensors), rtol=0, atol=0)
    finally:
        torch.backends.cudnn.deterministic = before


@parametrize_calls
def test_fresh_memory_filled_with_nan_changes_nothing(make_call: Callable[..., tuple[Call, list[Tensor]]]) -> None:
    function, tensors = make_call()
    expected = results(function, tensors)
    with fresh_memory_of_nan():
        torch.testing.assert_close(results(function, tensors), expected)  # cuDNN may take other algorithms here


# What torch itself says at the first `set_sync_debug_mode`.
ignore_prototype = pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")


@ignore_prototype
@parametrize_calls
def test_no_synchronisation(make_call: Callable[..., tuple[Call, list[Tensor]]]) -> None:
    function, tensors = make_call()
    results(function, tensors)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(function, tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@parametrize_calls
def test_cuda_graph_replay(make_call: Callable[..., tuple[Call, list[Tensor]]]) -> None:
    function, tensors = make_call()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        results(function, tensors)  # compiles, and lets the library choose
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(function, tensors)
    with torch.no_grad():
        tensors[0].copy_(tensors[0].flip(0))
    graph.replay()
    torch.testing.assert_close(captured, results(function, tensors))


@parametrize_calls
def test_on_another_stream(make_call: Callable[..., tuple[Call, list[Tensor]]]) -> None:
    function, tensors = make_call()
    expected = results(function, tensors)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(10**7)  # what ran on the default stream would be done long before
        actual = results(function, tensors)
    torch.cuda.current_stream().wait_stream(side)
    torch.testing.assert_close(actual, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@parametrize_calls
def test_on_a_device_that_is_not_current(make_call: Callable[..., tuple[Call, list[Tensor]]]) -> None:
    function, tensors = make_call()
    others = [tensor.detach().to("cuda:1").requires_grad_(tensor.requires_grad) for tensor in tensors]
    with torch.cuda.device(0):
        actual = results(function, others)
    assert all(result.device.index == 1 for result in actual)
    torch.testing.assert_close([result.to(CUDA) for result in actual], results(function, tensors))


@parametrize_calls
def test_compile_with_dynamic_sizes(make_call: Callable[..., tuple[Call, list[Tensor]]]) -> None:
    torch.compiler.reset()
    function, tensors = make_call()
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    torch.testing.assert_close(results(compiled, tensors), results(function, tensors))


@pytest.mark.parametrize("algorithm", ["fields", "direct", "library"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_opcheck_conv_relu_pool2d(algorithm: str) -> None:
    _, (input, weight, bias) = conv(algorithm, dtype=torch.float32)
    input, weight, bias = input.detach(), weight.detach(), bias.detach()
    geometry = flatten(resolve((3, 3), 1, 1, 1, 1, 2, None, 0, False)[0])
    forward = torch.ops.fastseg.conv_relu_pool2d.default
    for with_skip in (False, True):
        torch.library.opcheck(forward, (input, weight, bias, None, geometry, True, with_skip, False))
    output, positions, _ = forward(input, weight, bias, None, geometry, True, False, False)
    torch.library.opcheck(
        torch.ops.fastseg.conv_relu_pool2d_backward.default,
        (torch.randn_like(output), None, input, weight, positions, None, geometry, [True, True, True]),
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_opcheck_cross_entropy() -> None:
    _, (logits, labels) = loss()
    logits = logits.detach()
    forward = torch.ops.fastseg.cross_entropy.default
    torch.library.opcheck(forward, (logits, labels, None, -100, "mean", 0.1, False))
    value, statistics, total_weight = forward(logits, labels, None, -100, "mean", 0.1, True)
    torch.library.opcheck(
        torch.ops.fastseg.cross_entropy_backward.default,
        (torch.ones_like(value), logits, labels, None, statistics, total_weight, -100, "mean", 0.1),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    _, tensors = conv("fields", dtype=torch.float32)
    function = lambda *t: functional.conv_relu_pool2d(*t, padding=1)  # noqa: E731
    plain = lambda *t: reference.conv_relu_pool2d(*t, padding=1)  # noqa: E731

    def under_autocast(call: Call) -> Call:
        def run(*tensors: Tensor) -> Tensor:
            with torch.autocast("cuda", dtype):
                return call(*tensors)

        return run

    truth = values_and_gradients(plain, [t.detach().to(dtype).float().requires_grad_() for t in tensors], torch.float64)
    actual = values_and_gradients(under_autocast(function), tensors)
    assert actual[0].dtype == dtype
    assert_parity(actual, values_and_gradients(under_autocast(plain), tensors), truth, terms=tensors[0][:, 0].numel())
    logits, labels = loss()[1]
    with torch.autocast("cuda", dtype):
        assert functional.cross_entropy(logits, labels).dtype == torch.float32


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("with_overlap", [False, True], ids=["loss", "overlap"])
def test_opcheck_upsample_cross_entropy(with_overlap: bool) -> None:
    _, (logits, labels) = upsampled_loss()
    logits, options = logits.detach(), (-100, "mean", 0.1, "bilinear", False)
    forward = torch.ops.fastseg.upsample_cross_entropy.default
    torch.library.opcheck(forward, (logits, labels, None, *options, with_overlap, True))
    value, statistics, total_weight, overlap = forward(logits, labels, None, *options, with_overlap, True)
    saved = (logits, labels, None, statistics, total_weight)
    torch.library.opcheck(
        torch.ops.fastseg.upsample_cross_entropy_backward.default,
        (torch.ones_like(value), torch.randn_like(overlap), *saved, *options),
    )


@ignore_prototype
@pytest.mark.parametrize("return_confidence", [False, True], ids=["labels", "confidence"])
def test_predictions_twice_the_same_without_synchronisation(return_confidence: bool) -> None:
    _, (logits, labels) = upsampled_loss()

    def predict() -> list[Tensor]:
        prediction = functional.upsample_argmax(logits, (40, 56), return_confidence=return_confidence)
        matrix = functional.upsample_confusion_matrix(logits, labels, -100)
        return [*(prediction if return_confidence else (prediction,)), matrix]

    expected = predict()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = predict()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("volumes", [False, True], ids=["images", "volumes"])
def test_predictions_in_a_cuda_graph(volumes: bool) -> None:
    _, (logits, labels) = upsampled_loss()
    logits, size, mode = logits.detach(), (40, 56), "bilinear"
    if volumes:
        logits, labels = logits[:, :, None].repeat(1, 1, 3, 1, 1), labels[:, None].repeat(1, 5, 1, 1)
        size, mode = (5, 40, 56), "trilinear"

    def predict() -> tuple[Tensor, Tensor]:
        counts = functional.upsample_confusion_matrix(logits, labels, -100, mode=mode)
        return functional.upsample_argmax(logits, size, mode=mode), counts

    predict()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = predict()
    logits.copy_(logits.flip(0))
    graph.replay()
    torch.testing.assert_close(captured, predict(), rtol=0, atol=0)

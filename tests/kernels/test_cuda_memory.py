"""The operators on a CUDA device: the memory that they take, and tensors of more than 2^31 elements."""

import fcntl
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fastseg import functional, reference
from fastseg.testing import make

pytestmark = pytest.mark.gpu

GIB = 2**30
CUDA = torch.device("cuda")

# torch's allocator gives out a large block whole where less than 1 MiB of it would be left: here the gradient's and the
# statistics'; and the sums of programs, scalars.
ROUNDING = 2 * 2**20 + 2**18


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_cross_entropy_allocates_a_gradient_and_statistics(layout: str) -> None:
    shape = (4, 150, 256, 256)
    logits = torch.randn(shape, device=CUDA, dtype=torch.bfloat16)
    logits = logits.contiguous(
        memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format
    )
    logits.requires_grad_()
    labels = torch.randint(150, (4, 256, 256), device=CUDA)
    functional.cross_entropy(logits, labels).backward()
    logits.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    functional.cross_entropy(logits, labels).backward()
    growth = torch.cuda.max_memory_allocated() - before
    statistics = 2 * labels.numel() * 4
    assert growth < logits.nbytes + statistics + ROUNDING


def test_upsample_cross_entropy_allocates_no_upsampled_logits() -> None:
    logits = torch.randn((4, 150, 64, 64), device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(150, (4, 256, 256), device=CUDA)
    functional.upsample_cross_entropy(logits, labels).backward()
    logits.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    functional.upsample_cross_entropy(logits, labels).backward()
    growth = torch.cuda.max_memory_allocated() - before
    statistics = 2 * labels.numel() * 4
    assert growth < logits.nbytes + statistics + ROUNDING


@pytest.fixture
def needs_memory() -> Iterator[Callable[[int], None]]:
    """Skips a test where so many GiB aren't free; of several processes (pytest-xdist) one at a time takes them."""

    def check(gib: int) -> None:
        free, _ = torch.cuda.mem_get_info()
        if free < gib * GIB:
            pytest.skip(f"needs {gib} GiB of free GPU memory, has {free / GIB:.0f}")

    with open(Path(tempfile.gettempdir()) / "fastseg-gpu-memory.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield check
        torch.cuda.empty_cache()


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_more_than_2_to_the_31_logits(needs_memory: Callable[[int], None], layout: str) -> None:
    needs_memory(30)
    shape = (5, 7, 8192, 8192)  # 2.3 billion
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    logits = torch.empty(shape, dtype=torch.bfloat16, device=CUDA, memory_format=memory_format).normal_()
    labels = torch.randint(7, (5, 8192, 8192), dtype=torch.uint8, device=CUDA)
    logits.requires_grad_()
    losses = functional.cross_entropy(logits, labels, reduction="none")
    losses.backward(torch.ones((), dtype=losses.dtype, device=CUDA).expand_as(losses))
    for image, row in ((0, 0), (4, 8191)):
        part = logits.detach()[image : image + 1, :, row : row + 1].float().requires_grad_()
        expected = reference.cross_entropy(part, labels[image : image + 1, row : row + 1], reduction="none")
        (gradient,) = torch.autograd.grad(expected.sum(), part)
        torch.testing.assert_close(losses[image : image + 1, row : row + 1].float(), expected, rtol=1e-2, atol=1e-2)
        actual = logits.grad[image : image + 1, :, row : row + 1].float()
        torch.testing.assert_close(actual, gradient, rtol=1e-2, atol=1e-2)


def test_more_than_2_to_the_31_upsampled_logits(needs_memory: Callable[[int], None]) -> None:
    needs_memory(8)
    logits = torch.randn((1, 150, 1250, 1000), device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(150, (1, 5000, 4000), dtype=torch.uint8, device=CUDA)
    losses = functional.upsample_cross_entropy(logits, labels, reduction="none")
    losses.sum().backward()
    near = slice(-10, None)  # rows of the input; the last 32 of the output read them alone
    part = logits.detach()[..., near, :].float().requires_grad_()
    expected = reference.upsample_cross_entropy(part, labels[:, -40:], reduction="none")
    torch.testing.assert_close(losses[:, -32:].float(), expected[:, -32:], rtol=1e-2, atol=1e-2)
    (gradient,) = torch.autograd.grad(expected.sum(), part)
    torch.testing.assert_close(logits.grad[..., -8:, :].float(), gradient[..., -8:, :], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("channels", [3, 16], ids=["fields", "direct"])
def test_more_than_2_to_the_31_pixels(needs_memory: Callable[[int], None], channels: int, layout: str) -> None:
    needs_memory(30)
    side = 30000 if channels == 3 else 12000  # 2.7 and 2.3 billion numbers in an image
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    images = torch.empty((1, channels, side, side), dtype=torch.bfloat16, device=CUDA, memory_format=memory_format)
    images.normal_().requires_grad_(channels == 16)
    weight = make((8, channels, 3, 3), torch.bfloat16, scale=0.2).to(CUDA).requires_grad_()
    output = functional.conv_relu_pool2d(images, weight)
    # In double: rounded to bfloat16 before they are compared, other pixels would be the largest of their windows.
    far, exact = images.detach()[..., -66:, -66:].double(), weight.detach().double()
    expected = reference.conv_relu_pool2d(far, exact)
    torch.testing.assert_close(output[..., -32:, -32:].double(), expected, rtol=2e-2, atol=2e-2)
    incoming = torch.zeros_like(output)
    incoming[..., -32:, -32:] = 1  # what the far corner passes back alone
    wanted = [tensor for tensor in (images, weight) if tensor.requires_grad]
    gradients = torch.autograd.grad(output, wanted, incoming)
    leaves = [far.requires_grad_(), exact.requires_grad_()][-len(wanted) :]
    part = reference.conv_relu_pool2d(leaves[0] if len(leaves) == 2 else far, leaves[-1])
    for actual, truth in zip(gradients, torch.autograd.grad(part, leaves, torch.ones_like(part)), strict=True):
        near = actual[..., -66:, -66:] if actual.ndim == 4 and actual.shape[-1] == side else actual
        error = (near.double() - truth).norm() / truth.norm()
        assert error < 1e-2

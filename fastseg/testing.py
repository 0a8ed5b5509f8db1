"""Error bounds and input makers, shared by the tests and the benchmarks, and open to users who test their own models.

No bound here is a chosen number: a result may be off from a float64 truth by a small factor of what plain PyTorch
itself is off, in the same dtype on the same input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# How much farther from the truth than plain PyTorch a result may be. Another order of summation alone gives ratios
# around 1; of many elements the worst one scatters by 2 to 3.
ERROR_FACTOR = 4.0

# What a float32 loses at most, relative to it, where its mantissa is cut to TF32's 10 bits.
TF32_EPS = 2.0**-10

MEMORY_FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
MEMORY_FORMATS_OF_VOLUMES = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last_3d}


def make(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    layout: str = "nchw",
    scale: float = 1.0,
    requires_grad: bool = False,
) -> Tensor:
    """A normally distributed tensor, rounded to ``dtype`` (so that its float64 copy is the same numbers).

    Args:
        shape: The tensor's shape.
        dtype: Its dtype.
        seed: Seed of the numbers; the same in every dtype and layout.
        layout: "nchw" or "channels_last" (four or five dimensions).
        scale: Standard deviation.
        requires_grad: Whether the tensor is a leaf that collects gradients.

    Returns:
        The tensor, on torch's default device; its numbers are the same on all of them.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    values = (torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") * scale).to(dtype)
    return lay_out(values, layout).to(torch.get_default_device()).requires_grad_(requires_grad)


def lay_out(values: Tensor, layout: str) -> Tensor:
    """The tensor in a layout, as `make` has it."""
    formats = MEMORY_FORMATS_OF_VOLUMES if values.ndim == 5 else MEMORY_FORMATS
    return values.contiguous(memory_format=formats[layout])


def make_labels(
    shape: Sequence[int],
    num_classes: int,
    dtype: torch.dtype = torch.int64,
    *,
    seed: int = 0,
    ignore_index: int | None = None,
    ignored: float = 0.2,
) -> Tensor:
    """Uniformly distributed class indices; with ``ignore_index``, about the fraction ``ignored`` of them are it."""
    generator = torch.Generator("cpu").manual_seed(seed)
    labels = torch.randint(num_classes, shape, generator=generator, device="cpu")
    if ignore_index is not None:
        labels[torch.rand(shape, generator=generator, device="cpu") < ignored] = ignore_index
    return labels.to(torch.get_default_device(), dtype)


def values_and_gradients(
    function: Callable[..., Any], tensors: Sequence[Tensor | None], dtype: torch.dtype | None = None, **options: Any
) -> list[Tensor]:
    """The outputs of ``function(*tensors, **options)``, then the gradients of the tensors that require any.

    The floating-point outputs are weighed with fixed random numbers to be differentiated, so that no two elements share
    a gradient.

    Args:
        function: What to call.
        tensors: Its tensor arguments. Copies are taken, of the same strides where the tensor is dense.
        dtype: Where given, floating-point tensors are converted to it first (float64: the truth).
        options: Its other arguments.
    """
    leaves = [_leaf(tensor, dtype) for tensor in tensors]
    results = function(*leaves, **options)
    outputs = list(results) if isinstance(results, tuple) else [results]
    differentiable = [output for output in outputs if output.requires_grad]
    if not differentiable:
        return [output.detach() for output in outputs]
    incoming = [make(output.shape, torch.float32, seed=7).to(output) for output in differentiable]
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    gradients = torch.autograd.grad(differentiable, wanted, incoming)
    return [output.detach() for output in outputs] + list(gradients)


def _leaf(tensor: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    if tensor is None or not tensor.is_floating_point():
        return tensor
    copy = tensor.detach().to(dtype or tensor.dtype, copy=True)  # keeps the strides of a dense tensor
    return copy.requires_grad_(tensor.requires_grad)


def assert_parity(
    actual: Sequence[Tensor] | Tensor,
    plain: Sequence[Tensor] | Tensor,
    truth: Sequence[Tensor] | Tensor,
    *,
    terms: int = 1,
    factor: float = ERROR_FACTOR,
    eps: float | None = None,
) -> None:
    """Assert that ``actual`` is as close to ``truth`` as plain PyTorch is, but for a small factor.

    For the largest and for the root-mean-square error over a tensor: ``error(actual) <= factor * error(plain) +
    eps * sqrt(terms) * max|truth|``. The last term lets a sum of ``terms`` be rounded another way where plain PyTorch's
    own error happens to be zero. NaN and infinities must stand where plain PyTorch has them; integers must be equal.

    Args:
        actual: What fastseg gave.
        plain: What plain PyTorch gave in the same dtype.
        truth: What plain PyTorch gave in float64.
        terms: Length of the longest sum behind an element.
        factor: The factor.
        eps: What a product is rounded by, relative to it; None: the dtype's epsilon. `TF32_EPS` where tensor cores may
            cut a factor that plain PyTorch's own convolution, of which nobody knows whether it takes TF32, may not. Of
            products p that add up to t, that loses up to ``eps * sum|p| <= eps * sqrt(terms) * |p|``, the norm ``|p|``
            being the size of t where signs are random.

    Raises:
        AssertionError: The bound doesn't hold, or shapes or dtypes differ.
    """
    lists = [[value] if isinstance(value, Tensor) else list(value) for value in (actual, plain, truth)]
    for index, (a, p, t) in enumerate(zip(*lists, strict=True)):
        _assert_tensor_parity(f"result {index}", a, p, t, terms, factor, eps)


def _assert_tensor_parity(
    name: str, actual: Tensor, plain: Tensor, truth: Tensor, terms: int, factor: float, eps: float | None
) -> None:
    if (actual.shape, actual.dtype) != (plain.shape, plain.dtype):
        raise AssertionError(f"{name}: {actual.shape} {actual.dtype}, plain PyTorch {plain.shape} {plain.dtype}")
    if not actual.is_floating_point():
        torch.testing.assert_close(actual, plain, rtol=0, atol=0)
        return
    finite = plain.isfinite()
    torch.testing.assert_close(actual[~finite], plain[~finite], rtol=0, atol=0, equal_nan=True)
    if not finite.any():
        return
    exact = truth.double()[finite]
    error, plain_error = ((value.double()[finite] - exact).abs() for value in (actual, plain))
    rounding = (eps or torch.finfo(plain.dtype).eps) * math.sqrt(terms) * exact.abs().max()
    for norm, of in (("largest", torch.max), ("root-mean-square", lambda e: e.square().mean().sqrt())):
        bound = factor * of(plain_error) + rounding
        if not of(error) <= bound:
            raise AssertionError(
                f"{name}: {norm} error {of(error):.3g} exceeds {bound:.3g} (plain PyTorch's own: {of(plain_error):.3g})"
            )

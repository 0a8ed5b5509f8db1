"""conv_relu_pool2d's numbers: arguments made explicit and checked, output sizes, and positions in pooling windows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from fastseg._native import _C
from fastseg.ops.arguments import Pair, integer, pair

CUT = torch.iinfo(torch.uint8).max  # the position, kept as uint8, of a window whose maximum ReLU cut: no gradient
MAX_WINDOW = CUT  # positions in a pool window
LARGEST = 2**31 - 1  # padding and dilation, so that no sum or product of the kernels passes 64 bits

# The pairs of numbers that `flatten` gives first; the C++ kernels read no others.
PAIRS = ("stride", "padding", "dilation", "pool_size", "pool_stride", "pool_padding")
assert _C is None or _C.GEOMETRY == PAIRS

F = TypeVar("F", bound=Callable[..., Any])


class Geometry(NamedTuple):
    """All numbers of the operator, explicit and checked."""

    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    pool_size: Pair
    pool_stride: Pair
    pool_padding: Pair
    ceil_mode: bool

    @property
    def pool(self) -> tuple[Pair, Pair, Pair]:
        """What the pooling kernels get."""
        return self.pool_size, self.pool_stride, self.pool_padding

    def field(self, kernel: tuple[int, ...]) -> Pair:
        """Height and width of what a pooling window sees of the input."""
        height, width = (
            (size - 1) * stride + (taps - 1) * dilation + 1
            for size, stride, taps, dilation in zip(self.pool_size, self.stride, kernel, self.dilation, strict=True)
        )
        return height, width

    @property
    def windows_overlap(self) -> bool:
        """Whether a pixel of the convolution's output lies in several pooling windows."""
        return any(step < size for step, size in zip(self.pool_stride, self.pool_size, strict=True))


def memoize(function: F) -> F:
    """`functools.cache` for a function of plain numbers that a call pays more for than its arithmetic is worth.

    Compilers trace through to the function; arguments without a hash (symbolic sizes, lists) go there as well.
    """
    cached = functools.lru_cache(maxsize=4096)(function)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args)
        try:
            return cached(*args)
        except TypeError:  # no hash
            return function(*args)

    return cast(F, call)


@memoize
def flatten(geometry: Geometry) -> list[int]:
    """The numbers in a row, as the operator's schema and the C++ kernels take them: a call pays for each argument."""
    pairs = (getattr(geometry, name) for name in PAIRS)
    return [*(number for pair in pairs for number in pair), geometry.groups, int(geometry.ceil_mode)]


@memoize
def unflatten(numbers: tuple[int, ...]) -> Geometry:
    """The inverse of `flatten`."""
    pairs = dict(zip(PAIRS, zip(numbers[0:12:2], numbers[1:12:2], strict=True), strict=True))
    return Geometry(**pairs, groups=numbers[12], ceil_mode=bool(numbers[13]))


def resolve(
    kernel: tuple[int, ...],
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    pool_size: Any = 1,
    pool_stride: Any = None,
    pool_padding: Any = 0,
    ceil_mode: bool = False,
) -> tuple[Geometry, Pair]:
    """The arguments of `fastseg.functional.conv_relu_pool2d` as a `Geometry`; without a pool where none is given.

    Returns:
        The geometry, and the rows and columns of zeros that the input needs at its end beside the geometry's padding:
        none but for padding "same" with a kernel of even size.

    Raises:
        ValueError: A number is out of its range; the message names the argument.
    """
    sizes = pair("pool_size", pool_size, 1)
    return _resolve(
        kernel,
        pair("stride", stride, 1),
        padding if isinstance(padding, str) else pair("padding", padding, 0),
        pair("dilation", dilation, 1),
        integer("groups", groups, 1),
        sizes,
        sizes if pool_stride is None else pair("pool_stride", pool_stride, 1),
        pair("pool_padding", pool_padding, 0),
        bool(ceil_mode),
    )


@memoize
def _resolve(
    kernel: tuple[int, ...], stride: Pair, padding: Pair | str, dilation: Pair, groups: int, pool_size: Pair,
    pool_stride: Pair, pool_padding: Pair, ceil_mode: bool,
) -> tuple[Geometry, Pair]:  # fmt: skip
    """`resolve` for Python's own integers: to a cache, 2.0 is 2."""
    if any(2 * p > size for p, size in zip(pool_padding, pool_size, strict=True)):
        raise ValueError(f"pool_padding: expected at most half of pool_size {pool_size}, got {pool_padding}")
    extra = (0, 0)
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f'padding: expected numbers, "same" or "valid", got {padding!r}')
        if padding == "same" and stride != (1, 1):
            raise ValueError(f'stride: padding="same" needs stride 1, got {stride}')
        total = [d * (size - 1) if padding == "same" else 0 for d, size in zip(dilation, kernel, strict=True)]
        padding, extra = (total[0] // 2, total[1] // 2), (total[0] % 2, total[1] % 2)
    for name, numbers in (("padding", padding), ("dilation", dilation)):
        if max(numbers) > LARGEST:
            raise ValueError(f"{name}: expected at most {LARGEST} pixels, got {numbers}")
    return Geometry(stride, padding, dilation, groups, pool_size, pool_stride, pool_padding, ceil_mode), extra


@memoize
def convolved_size(height: int, width: int, kernel_h: int, kernel_w: int, geometry: Geometry) -> Pair:
    """Height and width of the convolution's output, as conv2d counts them.

    Raises:
        ValueError: The kernel is larger than the padded input.
    """
    sizes = []
    for axis, (size, kernel) in enumerate(((height, kernel_h), (width, kernel_w))):
        padded, reach = size + 2 * geometry.padding[axis], geometry.dilation[axis] * (kernel - 1) + 1
        if padded < reach:
            name = ("height", "width")[axis]
            raise ValueError(f"input: the kernel reaches over {reach} pixels of {name}, the padded input has {padded}")
        sizes.append((padded - reach) // geometry.stride[axis] + 1)
    return sizes[0], sizes[1]


@memoize
def idle_taps(sizes: Pair, kernel: Pair, geometry: Geometry) -> Pair:
    """How many taps at each end of a kernel see nothing but padding, by height and width.

    Wide dilations on small maps have such: of a DeepLab's 3x3 the middle remains.
    """
    return _idle_taps(0, sizes, kernel, geometry), _idle_taps(1, sizes, kernel, geometry)


def may_have_idle_taps(kernel: tuple[int, ...], geometry: Geometry) -> bool:
    """Whether taps at the ends of a kernel see nothing but padding on maps of some size."""
    axes = zip(kernel, geometry.padding, geometry.dilation, strict=True)
    return any(taps > 2 and padding >= dilation for taps, padding, dilation in axes)


def _idle_taps(axis: int, sizes: Pair, kernel: Pair, geometry: Geometry) -> int:
    size, taps, stride = sizes[axis], kernel[axis], geometry.stride[axis]
    padding, dilation = geometry.padding[axis], geometry.dilation[axis]
    last_output = (size + 2 * padding - dilation * (taps - 1) - 1) // stride * stride
    idle = 0
    # The first tap ends before the map, and the last one begins behind it; what remains has no negative padding.
    while taps - 2 * idle > 2 and dilation * (idle + 1) <= padding:
        if last_output + dilation * idle - padding >= 0 or dilation * (taps - 1 - idle) - padding < size:
            break
        idle += 1
    return idle


@memoize
def pooled_size(convolved_h: int, convolved_w: int, geometry: Geometry) -> Pair:
    """Height and width of the pooled output, as max_pool2d counts them.

    Raises:
        ValueError: No window fits.
    """
    sizes = []
    for size, window, stride, padding in zip((convolved_h, convolved_w), *geometry.pool, strict=True):
        room = size + 2 * padding - window
        steps = -(-room // stride) if geometry.ceil_mode else room // stride
        # With ceil_mode, the last window must start inside the input or its left padding.
        if geometry.ceil_mode and steps * stride >= size + padding:
            steps -= 1
        if steps < 0:
            raise ValueError(
                f"pool_size: {geometry.pool_size} leaves no output of a convolution of {convolved_h} x {convolved_w}"
            )
        sizes.append(steps + 1)
    return sizes[0], sizes[1]


def clamp_strides(geometry: Geometry, input: tuple[int, ...], kernel: tuple[int, ...]) -> Geometry:
    """The geometry with strides no longer than the way that they could go: the same outputs, and bounded products.

    ``input`` and ``kernel`` are height and width. Strides as short as windows stay, so that a graph for any size isn't
    bound to one.

    Raises:
        ValueError: The kernel is larger than the padded input.
    """
    if max(geometry.stride + geometry.pool_stride) <= MAX_WINDOW:
        return geometry
    extents = [n + 2 * p - d * (k - 1) for n, p, d, k in zip(input, *geometry[1:3], kernel, strict=True)]
    geometry = geometry._replace(stride=_clamp(geometry.stride, extents))
    convolved = convolved_size(input[0], input[1], kernel[0], kernel[1], geometry)
    extents = [n + p for n, p in zip(convolved, geometry.pool_padding, strict=True)]
    return geometry._replace(pool_stride=_clamp(geometry.pool_stride, extents))


def _clamp(strides: Pair, extents: list[int]) -> Pair:
    """Strides, those that are longer than windows no longer than extents."""
    rows, columns = (
        stride if stride <= MAX_WINDOW else max(min(stride, extent), MAX_WINDOW)
        for stride, extent in zip(strides, extents, strict=True)
    )
    return rows, columns


@memoize
def output_shapes(
    input: tuple[int, ...], weight: tuple[int, ...], geometry: Geometry
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the pooled output and of the convolution's, from the shapes of input and weight."""
    convolved = convolved_size(input[2], input[3], weight[2], weight[3], geometry)
    leading = (input[0], weight[0])
    return (*leading, *pooled_size(*convolved, geometry)), (*leading, *convolved)


def expand_indices(positions: Tensor, convolved: tuple[int, ...], geometry: Geometry) -> Tensor:
    """Window-local positions (uint8) as max_pool2d's indices: int64 offsets in the convolution's output.

    A window that ReLU cut is all zeros after it, so its first position inside the output is its maximum.
    """
    rows, columns = _window_corners(positions, geometry)
    local = positions.long()
    cut = local == CUT
    row = torch.where(cut, rows.clamp(min=0), rows + local // geometry.pool_size[1])
    column = torch.where(cut, columns.clamp(min=0), columns + local % geometry.pool_size[1])
    return row * convolved[1] + column


def local_positions(indices: Tensor, output: Tensor, convolved_w: int, geometry: Geometry) -> Tensor:
    """The inverse of `expand_indices`, given the pooled values (those not above zero were cut by ReLU)."""
    rows, columns = _window_corners(output, geometry)
    local = (indices // convolved_w - rows) * geometry.pool_size[1] + indices % convolved_w - columns
    return torch.where(output <= 0, CUT, local).to(torch.uint8)


def _window_corners(pooled: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """First row ``[PH, 1]`` and first column ``[PW]`` of the pooling windows, which may lie in the padding."""
    rows, columns = (
        torch.arange(size, device=pooled.device) * stride - padding
        for size, stride, padding in zip(pooled.shape[-2:], geometry.pool_stride, geometry.pool_padding, strict=True)
    )
    return rows[:, None], columns

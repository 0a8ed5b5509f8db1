"""Which algorithm serves a convolution: the one place that decides, for each device and direction.

"direct": one fused kernel; the full-resolution map is never in memory. "winograd": on a CPU, 3x3 convolutions with a
step of one pixel and the stem of a ResNet, fused too, and the gradients of 3x3 convolutions where they are dense.
"fields": on a GPU, a fused kernel for first layers. "library": torch's own convolution, then one kernel for (bias,)
ReLU, pooling and positions. Shapes, dtype and device decide alone, and on a GPU torch's setting of TF32.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from fastseg import _bfloat16
from fastseg._native import _C, INTERPRETED
from fastseg._tf32 import convolutions_take_tf32
from fastseg.ops.convolution.geometry import Geometry, idle_taps, may_have_idle_taps, output_shapes
from fastseg.ops.layouts import is_channels_last

# ---- a CPU ----

# Kernel taps (channels x height x width) up to which the direct kernels beat oneDNN's convolution and a pool. Measured
# with AVX2 (AMD Zen 3, 2026-11-22), 2x2 pool. Forward, with more taps arithmetic is the limit, where oneDNN is ahead:
# even at 288. Backward, the direct kernels need a quarter of the arithmetic and stay ahead: 1.7 to 3.5 times as fast on
# the shapes of the benchmarks, 1.3 times at 9216 taps, the most that were measured. Where a window begins at every
# position, the gradient isn't sparse: even at 288, 0.92 times as fast at 576.
DIRECT_FORWARD_MAX_TAPS = 288
DIRECT_BACKWARD_MAX_TAPS = 9216
DIRECT_DENSE_BACKWARD_MAX_TAPS = 288

# Bytes of padded input that the direct kernels may pack for one row of windows: a thread keeps them in memory of its
# own. Where strides, dilations or padding are so large, most of it would be skipped.
DIRECT_MAX_BYTES = 2**25
DIRECT_COLUMNS = 24 if _C is None else _C.DIRECT_COLUMNS  # up to which the forward rounds the convolution's columns

# Input pixels (of all images) from which a CPU takes Winograd's F(2x2, 3x3) where it can: fewer don't pay for the
# transform of the weights. Measured with AVX2 (AMD Zen 3, 2026-11-22): a tenth ahead of oneDNN at 256, even at 196.
WINOGRAD_MIN_PIXELS = 200
WINOGRAD_MIN_PIXELS_KEPT = 64  # of kept weights

# Where a dilated convolution of a prediction takes it: from how many pixels on, of all images, and how many times a map
# its windows of 2x2 may cover. Each phase (a dilation of 2 makes four of a map) has windows of its own, as many as the
# largest of them. Measured with AVX-512 (AMD Zen 4, 1 thread, 2026-11-27) against oneDNN with weights laid out before,
# on phases of 4x4 to 12x12: 1.2 to 1.4 times as fast from 576 pixels on, 0.94 to 1.2 times at 144 and 256, 0.9 times at
# 64; with a cover of 1.31 1.2 times as fast, even with one of 1.44, 0.6 times with one of 1.78.
WINOGRAD_IN_PHASES_MIN_PIXELS = 144
WINOGRAD_IN_PHASES_MAX_COVER = 1.35

# Input channels up to which it takes loops of its own, which know neither a skip nor how not to pool.
WINOGRAD_FEW_CHANNELS = 4 if _C is None else _C.FEW_CHANNELS

# Kernel, stride, dilation and pool of what it serves: plain layers, with and without a pool, and the stem of a ResNet.
WINOGRAD_POOLED = ((3, 3), (1, 1), (1, 1), ((2, 2), (2, 2), (0, 0)))
WINOGRAD_UNPOOLED = ((3, 3), (1, 1), (1, 1), ((1, 1), (1, 1), (0, 0)))
WINOGRAD_STEM = ((7, 7), (2, 2), (1, 1), ((3, 3), (2, 2), (1, 1)))

# Bytes of a gradient from which Winograd's backward kernel reads what ReLU passed beside it, instead of one that was
# written out before. Measured with AVX-512 (AMD Zen 4, 2026-11-27): it takes 0.98 to 1.08 times as long (median 1.03),
# and up to 1.2 times on small deep maps, where the memory doesn't count.
MASKED_MIN_BYTES = 2**22

# Products (output pixels x taps) from which conv2d comes to these kernels: fewer are done before Python's overhead is.
# Measured with AVX2 (AMD Zen 3, 2026-11-23), forward and backward, against torch's own: 0.7 to 1.3 times as fast at
# 0.5 M to 2.4 M, 0.9 to 1.2 times at 5 M to 8 M, 1.1 to 2.3 times at 20 M to 900 M.
CONV2D_MIN_PRODUCTS = 10_000_000

# Products (output values x taps) from which a prediction's convolution comes to oneDNN with weights that are laid out
# for it once. Measured with AVX-512 (AMD Zen 4, 1 thread, 2026-11-27) against torch's own in channels_last: 1.1 to 1.8
# times as fast for 1x1 at 4x24x24 and 4x12x12 pixels of 64 to 2048 channels, 1.0 to 1.4 for 3x3 with strides or
# dilations, 1.2 to 4 for depthwise 3x3; below a million, Python's overhead leaves it behind.
PACKED_MIN_PRODUCTS = 1_000_000

# Values of a map up to which torch's own ReLU and pool are ahead: they spare Python's overhead (about 0.1 ms forward
# and backward), and read channels_last nearly as fast. Measured on 2 cores with AVX2, 2026-11-23.
PLAIN_POOL_MAX_VALUES = 2**14
PLAIN_POOL_MAX_VALUES_CHANNELS_LAST = 2**17


def choose_cpu_forward(
    input: Tensor, weight: Tensor, geometry: Geometry, with_skip: bool, keep: bool = False, winograd: bool = True
) -> Literal["winograd", "direct", "library"]:
    """Which algorithm serves a forward call on a CPU.

    With ``keep``, Winograd's transformed weights are there already; without ``winograd``, it can't carry the values.

    A convolution of bfloat16 that no pool follows is oneDNN's where the CPU has instructions for it: they do twice the
    products of float32, which Winograd's kernels compute in. Measured on one (AMD Zen 4, 1 thread, 2026-11-27): those
    take 1.15 to 1.35 times as long there, 0.6 to 1.0 times under a pool, and a third without the instructions.
    """
    numbers = (tuple(weight.shape[2:]), geometry.stride, geometry.dilation, geometry.pool)
    many = input.shape[1] > WINOGRAD_FEW_CHANNELS
    if many and numbers == WINOGRAD_UNPOOLED and input.dtype == torch.bfloat16 and _bfloat16.cpu_multiplies_bfloat16():
        return "library"
    if with_skip:
        served = many and numbers == WINOGRAD_POOLED
    else:
        served = numbers in (WINOGRAD_POOLED, WINOGRAD_STEM) or (many and numbers == WINOGRAD_UNPOOLED)
    if winograd and served and geometry.groups == 1 and _pays_for_winograd(input, keep and many):
        return "winograd"
    if winograd and keep and many and not with_skip and _is_winograd_in_phases(input, weight, geometry):
        return "winograd"
    if with_skip:  # the skip is the full-resolution map itself
        return "library"
    return _direct_or_library(input, weight, geometry, DIRECT_FORWARD_MAX_TAPS)


def choose_cpu_backward(
    input: Tensor, weight: Tensor, geometry: Geometry, with_skip: bool
) -> Literal["winograd", "direct", "library"]:
    """Which algorithm serves a backward call on a CPU; ``with_skip``: the skip carries gradient.

    Where the gradient isn't sparse, Winograd's algorithm needs as little arithmetic as the direct kernels do where it
    is. Measured with AVX2 (AMD Zen 3, 2026-11-22): 1.1 to 3.7 times as fast as oneDNN, from 225 pixels and 5 channels.
    """
    sparse = not with_skip and geometry.pool_stride != (1, 1)
    if not sparse and _has_winograd_gradients(weight, geometry) and _pays_for_winograd(input):
        return "winograd"
    if with_skip or (not sparse and weight.shape[2:] == (1, 1)):  # 1x1: a matrix product, twice as fast there
        return "library"
    most_taps = DIRECT_BACKWARD_MAX_TAPS if sparse else DIRECT_DENSE_BACKWARD_MAX_TAPS
    return _direct_or_library(input, weight, geometry, most_taps)


def masks_as_it_reads(gradient: Tensor) -> bool:
    """Whether Winograd's backward kernel is to apply ReLU to a gradient by itself, so that it isn't written out."""
    return gradient.nbytes >= MASKED_MIN_BYTES


def differentiates_by_output(input: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether the gradient behind a ReLU that nothing is pooled after comes from its output in place of positions.

    What follows mostly keeps the output for a gradient of its own, so that positions would be a quarter more. On a CPU,
    where Winograd's algorithm serves the gradient; in a graph for any size that it may have.
    """
    if geometry.pool != WINOGRAD_UNPOOLED[3] or not _has_winograd_gradients(weight, geometry):
        return False
    pays = isinstance(input.numel(), torch.SymInt) or _pays_for_winograd(input)
    return pays and input.is_cpu and not INTERPRETED


def serves_conv2d(input: Tensor, weight: Tensor, geometry: Geometry, keep: bool = False) -> bool:
    """Whether a convolution alone is worth the operator on a CPU; in a graph for any size that it may have."""
    return winograd_serves_conv2d(input, weight, geometry, keep) or _spares_idle_taps(input, weight, geometry)


def _spares_idle_taps(input: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether leaving out taps that see nothing but padding is worth Python's overhead."""
    # TorchDynamo would bind its graph to a range of sizes; in torch's own calls there, the backend finds the places.
    if torch.compiler.is_dynamo_compiling() or not may_have_idle_taps((3, 3), geometry):
        return False
    if weight.shape[2:] != (3, 3) or geometry.groups > 1:
        return False
    products = input.numel() * weight[:, 0].numel()
    if isinstance(products, torch.SymInt):
        return True
    return products >= CONV2D_MIN_PRODUCTS and idle_taps((input.shape[2], input.shape[3]), (3, 3), geometry) != (0, 0)


def winograd_serves_conv2d(input: Tensor, weight: Tensor, geometry: Geometry, keep: bool = False) -> bool:
    """Whether a convolution alone, on a CPU, comes to Winograd's kernels; in a graph for any size that it may have."""
    if input.shape[1] <= WINOGRAD_FEW_CHANNELS or not _has_winograd_gradients(weight, geometry):
        return False
    products = input.numel() * weight.shape[0] * 9
    return isinstance(products, torch.SymInt) or (products >= CONV2D_MIN_PRODUCTS and _pays_for_winograd(input, keep))


def serves_conv2d_packed(input: Tensor, weight: Tensor, geometry: Geometry, frozen: bool = False) -> bool:
    """Whether a prediction's convolution on a CPU comes to weights that are kept for it.

    Of a ``frozen`` graph Inductor itself lays them out for oneDNN, and adds what follows in passing: then only where
    another algorithm or fewer taps serve it.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    if min(input.numel(), weight.numel()) == 0 or weight.shape[1] * geometry.groups != input.shape[1]:
        return False
    _, convolved = output_shapes(input.shape, weight.shape, geometry)
    products = math.prod(convolved) * weight[0].numel()
    if products < PACKED_MIN_PRODUCTS or winograd_serves_conv2d(input, weight, geometry, keep=True):
        return False
    return not frozen or _spares_idle_taps(input, weight, geometry) or _is_winograd_in_phases(input, weight, geometry)


def serves_relu_pool2d(input: Tensor) -> bool:
    """Whether a map is large enough for a kernel; in a graph for any size that it may have."""
    most = PLAIN_POOL_MAX_VALUES_CHANNELS_LAST if is_channels_last(input) else PLAIN_POOL_MAX_VALUES
    values = input.numel()
    if isinstance(values, torch.SymInt) or input.dtype != torch.float32 or not input.is_cpu or INTERPRETED:
        return True
    return not 0 < values <= most


def _direct_or_library(
    input: Tensor, weight: Tensor, geometry: Geometry, most_taps: int
) -> Literal["direct", "library"]:
    _, channels, height, width = weight.shape
    few = geometry.groups == 1 and channels * height * width <= most_taps  # the direct kernels have no groups
    return "direct" if few and _packs_few_bytes(input, weight, geometry) else "library"


def _packs_few_bytes(input: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether what a row of windows reads of the padded input is within `DIRECT_MAX_BYTES`."""
    padded = [extent + 2 * padding for extent, padding in zip(input.shape[2:], geometry.padding, strict=True)]
    stride, pool_stride = geometry.stride[0], geometry.pool_stride[0]
    reach = (geometry.pool_size[0] - 1) * stride + geometry.dilation[0] * (weight.shape[2] - 1) + 1
    rows = min(max(reach, pool_stride * stride), padded[0])
    columns = padded[1] + DIRECT_COLUMNS * geometry.stride[1]
    return rows * columns * input.shape[1] * max(input.element_size(), 4) <= DIRECT_MAX_BYTES


def _has_winograd_gradients(weight: Tensor, geometry: Geometry) -> bool:
    """Whether Winograd's algorithm has kernels for a convolution's dense gradients, and so for all of conv2d."""
    numbers = (tuple(weight.shape[2:]), geometry.stride, geometry.dilation, geometry.groups)
    # Beyond a padding of 2, the input gradient's convolution would have a negative one.
    return numbers == ((3, 3), (1, 1), (1, 1), 1) and max(geometry.padding) <= 2


def _is_winograd_in_phases(input: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether a dilated 3x3 convolution is worth Winograd's algorithm, by the windows that its phases have together."""
    undilated = geometry._replace(dilation=(1, 1))
    numbers = (tuple(weight.shape[2:]), undilated.stride, undilated.dilation, geometry.pool)
    if numbers != WINOGRAD_UNPOOLED or geometry.groups != 1 or geometry.dilation == (1, 1):
        return False
    if any(padding % dilation for padding, dilation in zip(geometry.padding, geometry.dilation, strict=True)):
        return False
    _, convolved = output_shapes(tuple(input.shape), tuple(weight.shape), geometry)
    covered = 1
    for size, dilation in zip(convolved[2:], geometry.dilation, strict=True):
        covered *= min(size, dilation) * 2 * math.ceil(math.ceil(size / dilation) / 2)
    pixels = input.shape[0] * input.shape[2] * input.shape[3]
    enough = pixels >= WINOGRAD_IN_PHASES_MIN_PIXELS
    return enough and covered <= WINOGRAD_IN_PHASES_MAX_COVER * math.prod(convolved[2:])


def _pays_for_winograd(input: Tensor, keep: bool = False) -> bool:
    """Whether it is worth its transform of the weights on a CPU."""
    least = WINOGRAD_MIN_PIXELS_KEPT if keep else WINOGRAD_MIN_PIXELS
    return 0 < least * input.shape[1] <= input.numel()


# ---- a GPU ----

# The limits of direct kernels' taps for Triton's. Estimated for an H200; measured there are 27 taps (5.9 times as fast
# as the best peer, forward and backward) and, by the library, 576 (2.5 times eager's, H100). With 144 taps (16 channels
# under 3x3) the product takes half as long as reading and writing the map would, with 288 as long. Half types and TF32
# multiply on tensor cores; full float32 doesn't, and is bound by arithmetic from the second layer on.
GPU_DIRECT_MAX_TAPS = 160
GPU_DIRECT_MAX_TAPS_WITHOUT_TENSOR_CORES = 64

# Of a window that the kernel for first layers serves: positions, and numbers of the input that they see (one tile of a
# product on tensor cores).
GPU_FIELD_POSITIONS = 4
GPU_FIELD_MAX_INPUTS = 64


def choose_gpu_forward(weight: Tensor, geometry: Geometry, with_skip: bool) -> Literal["fields", "direct", "library"]:
    """Which algorithm serves a forward call on a GPU."""
    algorithm = choose_gpu_backward(weight, geometry, with_skip)
    return "fields" if algorithm == "direct" and fits_fields(weight, geometry) else algorithm


def choose_gpu_backward(weight: Tensor, geometry: Geometry, with_skip: bool) -> Literal["direct", "library"]:
    """Which algorithm serves a backward call on a GPU; ``with_skip``: the skip carries gradient."""
    if geometry.groups > 1 or with_skip or weight.dtype == torch.float64:  # float64 products are the library's
        return "library"
    if geometry.windows_overlap:  # the direct kernels would convolve what windows share for each: 2.25 times, in a stem
        return "library"
    tensor_cores = weight.dtype != torch.float32 or convolutions_take_tf32()
    most_taps = GPU_DIRECT_MAX_TAPS if tensor_cores else GPU_DIRECT_MAX_TAPS_WITHOUT_TENSOR_CORES
    return "direct" if weight[0].numel() <= most_taps else "library"


def fits_fields(weight: Tensor, geometry: Geometry) -> bool:
    """Whether the kernel for first layers can do a call of the direct ones: small fields, on tensor cores."""
    height, width = geometry.field(weight.shape[2:])
    if geometry.pool_size[0] * geometry.pool_size[1] != GPU_FIELD_POSITIONS:
        return False
    tensor_cores = weight.dtype.itemsize == 2 or (
        weight.dtype == torch.float32 and not weight.is_cpu and convolutions_take_tf32()
    )
    return tensor_cores and height * width * weight.shape[1] <= GPU_FIELD_MAX_INPUTS

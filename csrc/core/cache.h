// How much memory a task may work on at a time, so that it stays in a core's caches: of the L1 data cache, which has at
// least 32 KB, and the L2 cache, at least 512 KB on the machines that the kernels were measured on.
#pragma once

#include <stdint.h>

namespace fastseg {

// ---- losses and predictions ----

// L1: the logits of a block of upsampled pixels, which three loops go over.
constexpr int64_t kPixelBlockBytes = 16 * 1024;

// L2: the rows, one a class, of a tile of cross_entropy's pixels.
constexpr int64_t kPixelTileBytes = 192 * 1024;

// L2: the input rows, expanded to a tile's columns, that output rows are blended of, and their gradients.
constexpr int64_t kUpsampledRowsBytes = 256 * 1024;

// ---- convolutions ----

// L2: the rows that relu_pool2d pools, of one block of channels.
constexpr int64_t kPooledRowsBytes = 128 * 1024;

// L2: the packed input of a band of the direct convolution, beside the weights; of its backward pass, the packed
// gradient.
constexpr int64_t kDirectBandBytes = 192 * 1024;
constexpr int64_t kDirectGradientBytes = 256 * 1024;

// L1: of the direct backward pass, the input of a tile of windows, one chunk wide, beside the sums; L2: its lists.
constexpr int64_t kWindowTileBytes = 16 * 1024;
constexpr int64_t kWindowListBytes = 128 * 1024;

// L2, Winograd's algorithm: where vectors run along windows, the packed input of a band; where they run along channels,
// that of a larger band, and the transformed patches that are multiplied together. Where the fewest patches take more
// than the last number, those of one product at a time: they stay for all blocks of output channels.
constexpr int64_t kWinogradWindowsBandBytes = 64 * 1024;
constexpr int64_t kWinogradBandBytes = 288 * 1024;
constexpr int64_t kWinogradPatchBytes = 256 * 1024;
constexpr int64_t kWinogradPlaneBytes = 128 * 1024;
constexpr int64_t kWinogradAllProductsBytes = 160 * 1024;

// L3: the products that a task of a deep layer adds slices of its channels to.
constexpr int64_t kWinogradProductsBytes = 1536 * 1024;

// ---- normalisation ----

// The values whose mean is taken, and then the squares about it: of a plane in L1; of pixels in L2, so that what is
// written in planes comes in runs of many lines. L3: those of the images that are summed up and then normalised.
constexpr int64_t kNormPlaneBytes = 16 * 1024;
constexpr int64_t kNormPixelsBytes = 64 * 1024;
constexpr int64_t kNormImagesBytes = 4 * 1024 * 1024;

}  // namespace fastseg

// How much memory a task may work on at a time, so that it stays in a core's caches: of the L1 data cache, which has at
// least 32 KB, and the L2 cache, at least 512 KB on the machines that the kernels were measured on.
#pragma once

#include <stdint.h>

namespace fastseg {

// L1: the logits of a block of upsampled pixels, which three loops go over.
constexpr int64_t kPixelBlockBytes = 16 * 1024;

// L2: the rows, one a class, of a tile of cross_entropy's pixels.
constexpr int64_t kPixelTileBytes = 192 * 1024;

// L2: the input rows, expanded to a tile's columns, that output rows are blended of, and their gradients.
constexpr int64_t kUpsampledRowsBytes = 256 * 1024;

}  // namespace fastseg

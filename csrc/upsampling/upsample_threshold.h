// upsample_threshold: which upsampled logits lie above a number, and what the masks of those are like. Arguments of its
// CPU kernel.
#pragma once

#include "core/isa.h"
#include "core/tensor.h"
#include "upsampling/upsampling.h"

namespace fastseg {

struct UpsampleThreshold {
  Tensor input;   // [N, C, h, w]: logits of any strides, C > 0
  Tensor masks;   // [N, C, H, W] of uint8, dense
  Tensor scores;  // [N, C] of input's dtype, dense, optional: the mean probability inside each mask
  Tensor boxes;   // [N, C, 4] of int64, dense, with scores: left, top, and the first column and row beyond
  double bound;   // the logit that those inside are above
  Upsampling grid;
  int threads;
};

FASTSEG_KERNEL(upsample_threshold, UpsampleThreshold)

}  // namespace fastseg

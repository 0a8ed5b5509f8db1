// upsample_argmax: the class of the largest upsampled logit. Arguments of its CPU kernel.
#pragma once

#include "core/isa.h"
#include "core/tensor.h"
#include "upsampling/upsampling.h"

namespace fastseg {

struct UpsampleArgmax {
  Tensor input;       // [N, C, h, w] or [N, C, d, h, w]: logits of any strides, C > 0
  Tensor labels;      // [N, H, W] or [N, D, H, W], dense: uint8, int16, int32 or int64
  Tensor confidence;  // the same of input's dtype, dense, optional: the label's softmax value
  Upsampling grid;
  int threads;
};

FASTSEG_KERNEL(upsample_argmax, UpsampleArgmax)

}  // namespace fastseg

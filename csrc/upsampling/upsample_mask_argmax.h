// upsample_mask_argmax: the class that the upsampled masks of all queries add up to most of. Arguments of its CPU
// kernel.
#pragma once

#include "core/isa.h"
#include "core/tensor.h"
#include "upsampling/upsampling.h"

namespace fastseg {

struct UpsampleMaskArgmax {
  Tensor input;                // [N, Q, h, w]: logits of masks, of any strides, Q > 0
  Tensor class_probabilities;  // [N, Q, C], of any strides, C > 0: float64 where input is, else float32
  Tensor labels;               // [N, H, W], dense: uint8, int16, int32 or int64
  Upsampling grid;
  int threads;
};

FASTSEG_KERNEL(upsample_mask_argmax, UpsampleMaskArgmax)

}  // namespace fastseg

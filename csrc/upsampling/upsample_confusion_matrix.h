// upsample_confusion_matrix: how often each class was taken for each class where the logits are upsampled to the
// labels' size. Arguments of its CPU kernel.
#pragma once

#include "loss/cross_entropy.h"
#include "upsampling/upsampling.h"

namespace fastseg {

struct UpsampleConfusionMatrix {
  Tensor input;   // [N, C, h, w]: logits of any strides, C > 0
  Tensor target;  // [N, H, W]: labels of any integer dtype, any strides
  Tensor matrix;  // [C, C] of int64, dense: labels x predictions
  int64_t ignore_index;
  Upsampling grid;
  InvalidLabel* invalid;  // as cross_entropy's
  int threads;
};

FASTSEG_KERNEL(upsample_confusion_matrix, UpsampleConfusionMatrix)

}  // namespace fastseg

// upsample_sigmoid_sums: sums over the pixels of each image and class that losses of sigmoids are made of, of logits
// upsampled to the target's size. Arguments of its CPU kernels; fastseg/ops/upsample_sigmoid_sums.py defines the sums.
#pragma once

#include "loss/cross_entropy.h"
#include "upsampling/upsampling.h"

namespace fastseg {

struct UpsampleSigmoidSums {
  Tensor input;   // [N, C, h, w]: logits of any strides, C > 0
  Tensor target;  // [N, H, W] labels of any integer dtype; or [N, C, H, W] shares of any dtype, doubles as input's
  Tensor
      sums;  // [3, N, C] or, with focal factors, [6, N, C] of T; forward fills it, dense, backward reads its gradient
  int64_t ignore_index;
  double gamma, threshold;  // threshold 0: none
  bool smaller;             // in place of p t the smaller of the two, for [3, N, C]
  Upsampling grid;
  InvalidLabel* invalid;  // as cross_entropy's
  int threads;
};

struct UpsampleSigmoidSumsBackward : UpsampleSigmoidSums {
  Tensor grad_input;  // of input's shape and dtype
};

FASTSEG_KERNEL(upsample_sigmoid_sums_forward, UpsampleSigmoidSums)
FASTSEG_KERNEL(upsample_sigmoid_sums_backward, UpsampleSigmoidSumsBackward)

}  // namespace fastseg

// The predictions of upsampled logits: arguments of their CPU kernels.
#pragma once

#include "loss/losses.h"

namespace fastseg {

// The class of the largest upsampled logit.
struct UpsampleArgmax {
  Tensor input;       // [N, C, h, w] or [N, C, d, h, w]: logits of any strides, C > 0
  Tensor labels;      // [N, H, W] or [N, D, H, W], dense: uint8, int16, int32 or int64
  Tensor confidence;  // the same of input's dtype, dense, optional: the label's softmax value
  Upsampling grid;
  int threads;
};

// How often each class was taken for each class where the logits are upsampled to the labels' size.
struct UpsampleConfusionMatrix {
  Tensor input;   // [N, C, h, w]: logits of any strides, C > 0
  Tensor target;  // [N, H, W]: labels of any integer dtype, any strides
  Tensor matrix;  // [C, C] of int64, dense: labels x predictions
  int64_t ignore_index;
  Upsampling grid;
  InvalidLabel* invalid;  // as cross_entropy's
  int threads;
};

// The class that the upsampled masks of all queries add up to most of.
struct UpsampleMaskArgmax {
  Tensor input;                // [N, Q, h, w]: logits of masks, of any strides, Q > 0
  Tensor class_probabilities;  // [N, Q, C], of any strides, C > 0: float64 where input is, else float32
  Tensor labels;               // [N, H, W], dense: uint8, int16, int32 or int64
  Upsampling grid;
  int threads;
};

// Which upsampled logits lie above a number, and what the masks of those are like.
struct UpsampleThreshold {
  Tensor input;   // [N, C, h, w]: logits of any strides, C > 0
  Tensor masks;   // [N, C, H, W] of uint8, dense
  Tensor scores;  // [N, C] of input's dtype, dense, optional: the mean probability inside each mask
  Tensor boxes;   // [N, C, 4] of int64, dense, with scores: left, top, and the first column and row beyond
  double bound;   // the logit that those inside are above
  Upsampling grid;
  int threads;
};

FASTSEG_KERNEL(upsample_argmax, UpsampleArgmax)
FASTSEG_KERNEL(upsample_confusion_matrix, UpsampleConfusionMatrix)
FASTSEG_KERNEL(upsample_mask_argmax, UpsampleMaskArgmax)
FASTSEG_KERNEL(upsample_threshold, UpsampleThreshold)

}  // namespace fastseg

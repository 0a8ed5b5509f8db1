// The losses: arguments of their CPU kernels. "Dense" is contiguous; T is double for float64 logits, else float.
#pragma once

#include "core/isa.h"
#include "core/tensor.h"
#include "upsampling/upsampling.h"

namespace fastseg {

enum class Reduction { kNone, kMean, kSum };

// The ignore_index where no label is to be ignored: a number that is no class either.
constexpr int64_t kIgnoreNone = INT64_MIN;

struct InvalidLabel {
  bool found;
  int64_t value;
};

// cross_entropy: log-softmax over the classes and the (weighted, smoothed) negative log-likelihood as one operator.
// What forward and backward share.
struct CrossEntropy {
  Tensor input;   // [N, C, d1, ...]: logits of any strides, C > 0
  Tensor target;  // [N, d1, ...] classes, integers; or [N, C, d1, ...] class probabilities
  Tensor weight;  // [C] of T, dense, optional
  // [2, N, d1, ...] of T, dense: per pixel the largest logit, and log(sum(exp(logit - largest))). Apart, since their
  // sum, the log-sum-exp, has lost the second's digits where the first is large. Optional forward.
  Tensor statistics;
  Tensor total_weight;  // [] of T: what "mean" divides by
  int64_t ignore_index;
  Reduction reduction;
  double label_smoothing;
  InvalidLabel* invalid;  // after the call: the first label that is neither a class nor ignore_index, if there is one
  int threads;
};

struct CrossEntropyForward : CrossEntropy {
  Tensor loss;  // of T, dense: [N, d1, ...] for kNone, else []
};

struct CrossEntropyBackward : CrossEntropy {
  Tensor grad_output;  // of loss's shape and dtype, any strides
  Tensor grad_input;   // of input's shape and dtype
};

// upsample_cross_entropy: cross-entropy of logits upsampled to the labels' size, with input [N, C, h, w], labels
// [N, H, W], and statistics and loss of the labels' size; of volumes with a depth before the height. Forward's
// statistics, overlap and gradient are optional, as is backward's grad_overlap.
struct UpsampleCrossEntropyForward : CrossEntropyForward {
  Upsampling grid;
  // [N, C, h, w] of T: the gradient of the sum of all pixels' weighted losses. It costs less here than in a backward
  // pass of its own, which has to make the probabilities again. Statistics and overlap are not made with it.
  Tensor gradient;
  // [3, N, C] of T, dense: sums over the pixels of an image that aren't ignored, with P = softmax of a pixel:
  // sum(P [label = c]), sum(P), and the number of pixels with label c.
  Tensor overlap;
};

struct UpsampleCrossEntropyBackward : CrossEntropyBackward {
  Upsampling grid;
  Tensor grad_overlap;  // of overlap's shape and dtype, any strides
};

// upsample_sigmoid_sums: sums over the pixels of each image and class that losses of sigmoids are made of, of logits
// upsampled to the target's size. fastseg/ops/upsample_sigmoid_sums.py defines the sums.
struct UpsampleSigmoidSums {
  Tensor input;   // [N, C, h, w]: logits of any strides, C > 0
  Tensor target;  // [N, H, W] labels of any integer dtype; or [N, C, H, W] shares of any dtype, doubles as input's
  // [3, N, C] or, with focal factors, [6, N, C] of T; forward fills it, dense, backward reads its gradient.
  Tensor sums;
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

FASTSEG_KERNEL(cross_entropy_forward, CrossEntropyForward)
FASTSEG_KERNEL(cross_entropy_backward, CrossEntropyBackward)
FASTSEG_KERNEL(upsample_cross_entropy_forward, UpsampleCrossEntropyForward)
FASTSEG_KERNEL(upsample_cross_entropy_backward, UpsampleCrossEntropyBackward)
FASTSEG_KERNEL(upsample_sigmoid_sums_forward, UpsampleSigmoidSums)
FASTSEG_KERNEL(upsample_sigmoid_sums_backward, UpsampleSigmoidSumsBackward)

}  // namespace fastseg

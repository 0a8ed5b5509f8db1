// cross_entropy: log-softmax over the classes and the (weighted, smoothed) negative log-likelihood as one operator.
// Arguments of its CPU kernels. "Dense" is contiguous; T is double for float64 logits and float for all others.
#pragma once

#include "core/isa.h"
#include "core/tensor.h"

namespace fastseg {

enum class Reduction { kNone, kMean, kSum };

// The ignore_index where no label is to be ignored: a number that is no class either.
constexpr int64_t kIgnoreNone = INT64_MIN;

struct InvalidLabel {
  bool found;
  int64_t value;
};

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

FASTSEG_KERNEL(cross_entropy_forward, CrossEntropyForward)
FASTSEG_KERNEL(cross_entropy_backward, CrossEntropyBackward)

}  // namespace fastseg

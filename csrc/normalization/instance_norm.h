// Instance normalisation and the leaky ReLU that follows it: arguments of the CPU kernels. T is the input's dtype,
// float or double; a value's channel is c, its image n.
#pragma once

#include "core/isa.h"
#include "core/tensor.h"

namespace fastseg {

// What forward and backward share.
struct InstanceNorm {
  Tensor input;       // [N, C, S] of T: planes (S dense) or pixels (C dense), in one piece; S > 0
  Tensor weight;      // [C] of T, dense, optional: 1
  Tensor bias;        // [C] of T, dense, optional: 0
  Tensor statistics;  // [2, N, C] of T, dense: the mean, and 1 / sqrt(variance + eps)
  bool in_pixels;     // how the input lies
  double negative_slope;
  int threads;
};

// output = leaky_relu((input - mean) * weight[c] / sqrt(variance + eps) + bias[c])
struct InstanceNormForward : InstanceNorm {
  Tensor output;  // as input, in planes
  double eps;
};

struct InstanceNormBackward : InstanceNorm {
  Tensor grad_output;  // as input; where that lies in pixels, in either way
  bool gradient_in_pixels;
  Tensor grad_input;  // as input
  Tensor sums;        // [2, N, C] of T, dense: each image's terms of the gradients of weight and bias
};

FASTSEG_KERNEL(instance_norm_forward, InstanceNormForward)
FASTSEG_KERNEL(instance_norm_backward, InstanceNormBackward)

}  // namespace fastseg

// conv_relu_pool2d: convolution, bias, ReLU and max pooling as one operator. Arguments and geometry of its CPU kernels.
#pragma once

#include "core/isa.h"
#include "core/tensor.h"

namespace fastseg {

// Positions are uint8: the index of the maximum in its window in scan order, or kCut where ReLU cut the maximum.
constexpr int kCut = UINT8_MAX;

// Input channels up to which loops over windows are ahead of matrix products in Winograd's algorithm (AVX2, AMD Zen 3,
// 2026-11-22: twice at 3 channels). All of a window's sums are unrolled: each number of channels is compiled.
constexpr int64_t kFewChannels = 4;

// To a multiple of at most so many columns do the direct forward kernels round a row, on any instruction set.
constexpr int64_t kDirectColumns = 24;

// Index 0 is the height, index 1 the width.
struct ConvPoolGeometry {
  int64_t stride[2], padding[2], dilation[2];
  int64_t pool_size[2], pool_stride[2], pool_padding[2];
};

// output, positions = max_pool(relu(conv(input, weight) + bias)); the full-resolution map is never in memory.
struct ConvReluPool2dForward {
  Tensor input;      // [N, C, H, W]
  Tensor weight;     // [K, C, kernel height, kernel width]
  Tensor bias;       // [K], optional
  Tensor output;     // [N, K, pooled height, pooled width]
  Tensor positions;  // of output's shape, optional
  ConvPoolGeometry geometry;
  int threads;
};

// The same by Winograd's algorithm, for 3x3 convolutions under a pool of 2x2 or of 1x1 (which is none), under none with
// any dilation that divides the padding, and for 7x7 of stride 2 under a pool of 3x3.
struct ConvReluPool2dWinogradForward : ConvReluPool2dForward {
  Tensor skip;    // [N, K, convolved height, convolved width], optional under 2x2: relu(conv(input))
  Tensor scale;   // [K], optional, for 3x3: by which the weight's output channels are multiplied
  Tensor kept;    // uint8 [bytes], optional, for 3x3 and more than kFewChannels: transformed weights stay there
  Tensor passed;  // of input's shape, optional: of an input that is a gradient, the ReLU's output that it came through
  bool relu = true;    // false, without a pool: output = conv(input) + bias, which is conv2d
  uint64_t stamp = 0;  // where it isn't zero, it stands for the weight's values, which aren't read to see a change
  bool* done;  // false where its sums might overflow or anything isn't finite: then the outputs hold nothing of use
};

// How large `kept` has to be for a weight.
struct Conv2dWinogradKeptBytes {
  Tensor weight;
  int64_t* bytes;
};

// A number that changes with weights, and with the scale of their output channels.
struct Conv2dWeightsFingerprint {
  Tensor weight, scale;  // [K, C, kernel height, kernel width], dense in either memory format; [K], optional
  uint64_t stamp;        // as of `ConvReluPool2dWinogradForward`
  int threads;
  uint64_t* fingerprint;
};

// The gradients of a convolution, those that are given as tensors.
struct ConvGradients {
  Tensor input, weight;                       // [N, C, H, W], [K, C, kernel height, kernel width]
  Tensor grad_input, grad_weight, grad_bias;  // each optional
  int threads;
};

// From the sparse gradient of the pooled output.
struct ConvReluPool2dBackward : ConvGradients {
  Tensor grad_output, positions;
  ConvPoolGeometry geometry;
};

// conv2d's gradients, from the dense gradient of its output, for 3x3 of stride 1, by Winograd's algorithm.
struct Conv2dWinogradBackward : ConvGradients {
  Tensor grad_output;  // [N, K, convolved height, convolved width]
  Tensor passed;       // of the same shape, optional: where ReLU follows, its output, and grad_output is of that
  int64_t padding[2];  // at most 2
  bool* done;          // as of the forward
};

// What follows a library's convolution: output, positions = max_pool(relu(input)).
struct ReluPool2dForward {
  Tensor input;  // [N, K, H, W]; with relu_in_place it becomes relu(input), which needs windows that don't overlap
  Tensor output, positions;
  ConvPoolGeometry geometry;  // of which the pooling half counts
  bool relu_in_place;
  int threads;
};

// grad_input = the dense gradient of the convolution's output, from the pooled gradient and that of the skip.
struct ReluPool2dBackward {
  Tensor grad_output, positions;  // optional together
  Tensor skip, grad_skip;         // optional together: relu(conv) and its own gradient
  Tensor grad_input;              // [N, K, H, W]
  ConvPoolGeometry geometry;
  int threads;
};

FASTSEG_KERNEL(conv_relu_pool2d_forward, ConvReluPool2dForward)
FASTSEG_KERNEL(conv_relu_pool2d_winograd_forward, ConvReluPool2dWinogradForward)
FASTSEG_KERNEL(conv2d_winograd_backward, Conv2dWinogradBackward)
FASTSEG_KERNEL(conv2d_winograd_kept_bytes, Conv2dWinogradKeptBytes)
FASTSEG_KERNEL(conv2d_weights_fingerprint, Conv2dWeightsFingerprint)
FASTSEG_KERNEL(conv_relu_pool2d_backward, ConvReluPool2dBackward)
FASTSEG_KERNEL(relu_pool2d_forward, ReluPool2dForward)
FASTSEG_KERNEL(relu_pool2d_backward, ReluPool2dBackward)

}  // namespace fastseg

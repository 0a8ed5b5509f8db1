// upsample_cross_entropy: cross-entropy of logits upsampled to the labels' size, as one operator. Arguments of its CPU
// kernels: those of cross_entropy, with input [N, C, h, w], labels [N, H, W], and statistics and loss of the labels'
// size. Forward's statistics, overlap and gradient are optional, as is backward's grad_overlap.
#pragma once

#include "loss/cross_entropy.h"
#include "upsampling/upsampling.h"

namespace fastseg {

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

FASTSEG_KERNEL(upsample_cross_entropy_forward, UpsampleCrossEntropyForward)
FASTSEG_KERNEL(upsample_cross_entropy_backward, UpsampleCrossEntropyBackward)

}  // namespace fastseg

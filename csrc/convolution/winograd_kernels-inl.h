// The kernels of a 3x3 convolution as Winograd's F(2x2, 3x3) multiplies patches with them, in blocks of output
// channels.
#pragma once

#include "convolution/conv_relu_pool2d.h"
#include "convolution/conv_tile-inl.h"
#include "convolution/register_tile-inl.h"
#include "convolution/winograd-inl.h"
#include "core/parallel.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

// Transformed weights that don't stay are made for as many output channels at a time as take so many bytes (those of a
// deep layer take four times a second-level cache, and more memory than its input and output), but for so many channels
// at least: each pass transforms the input anew.
constexpr int64_t kPassBytes = 16 * 1024 * 1024;
constexpr int64_t kLeastPassChannels = 128;

template <class T>
struct WinogradKernels {
  const ConvReluPool2dWinogradForward& call;
  const int64_t c, k;    // input and output channels
  const int64_t blocks;  // of output channels
  Span at_once = {};     // blocks whose weights are transformed: all of them, or a pass's
  T* weights = nullptr;  // [blocks at once][products][c][block], a plane to a product
  T* bias = nullptr;     // [blocks at once][block]
  T largest_input = 0;   // up to which nothing overflows

  explicit WinogradKernels(const ConvReluPool2dWinogradForward& of)
      : call(of), c(of.weight.size[1]), k(of.weight.size[0]), blocks(ceil_div(k, kBlock<T>)) {}

  int vectors(int64_t block) const { return vectors_of<T>(k, block); }

  // One product's weights of a block of channels.
  int64_t weight_plane() const { return c * kBlock<T> + kRowPadding; }

  int64_t block_elements() const { return kProducts * weight_plane(); }

  // Of some blocks.
  int64_t workspace_elements(int64_t count) const { return count * (block_elements() + kBlock<T> + 2); }

  // Blocks to a pass, evenly divided, where what is made of the weights doesn't stay.
  int64_t pass_blocks() const {
    const int64_t least = min_of(ceil_div(kLeastPassChannels, kBlock<T>), blocks);
    const int64_t most = max_of(kPassBytes / (block_elements() * int64_t{sizeof(T)}), least);
    return ceil_div(blocks, ceil_div(blocks, most));
  }

  const T* weights_of(int64_t block) const { return weights + (block - at_once.begin) * block_elements(); }
  const T* bias_of(int64_t block) const { return bias + (block - at_once.begin) * kBlock<T>; }

  // The largest magnitudes of each block's weights, then of its bias.
  T* maxima() const { return bias + at_once.size() * kBlock<T>; }

  // Of the block at `place` of those at once.
  bool transform_weights(int64_t place) const {
    const int64_t block = at_once.begin + place;
    const int64_t lanes = vectors(block) * kLanes<T>, first = block * kBlock<T>, count = min_of(k - first, lanes);
    const int64_t elements = kKernelTaps * c * lanes;
    T* taps = static_cast<T*>(scratch(elements * int64_t{sizeof(T)}));  // [a kernel's elements][lanes]
    if (taps == nullptr) return false;
    memset(taps, 0, static_cast<size_t>(elements) * sizeof(T));
    T* shift = bias + place * kBlock<T>;
    memset(shift, 0, kBlock<T> * sizeof(T));
    if (call.bias)
      pack(at(call.bias, first * call.bias.stride[0]), call.bias.dtype, 1, count, 0, call.bias.stride[0], shift, 0);
    const KernelStrides step = pack_kernels(first, count, lanes, taps);
    if (call.scale) scale_kernels(first, count, lanes, elements, taps);
    maxima()[place] = largest_magnitude(taps, elements);
    maxima()[at_once.size() + place] = largest_magnitude(shift, kBlock<T>);
    for (int64_t i = 0; i < c * lanes; i += kLanes<T>) {
      Vec<T> g[kKernelTaps], u[kSide][kSide];
      for (int64_t tap = 0; tap < kKernelTaps; ++tap) {
        const int64_t row = tap / kKernelSide, column = tap % kKernelSide;
        g[tap] = load(taps + (i / lanes * step.c + row * step.row + column * step.column) * lanes + i % lanes);
      }
      transform_kernel(g, u);
      T* target = weights + place * block_elements() + i;
      for (int product = 0; product < kProducts; ++product)
        store<T>(target + product * weight_plane(), u[product / kSide][product % kSide]);
    }
    return true;
  }

  void scale_kernels(int64_t first, int64_t count, int64_t lanes, int64_t elements, T* taps) const {
    T scale[kBlock<T>] = {};
    pack(at(call.scale, first * call.scale.stride[0]), call.scale.dtype, 1, count, 0, call.scale.stride[0], scale, 0);
    for (int64_t i = 0; i < elements; i += kLanes<T>) store<T>(taps + i, load(taps + i) * load(scale + i % lanes));
  }

  struct KernelStrides {
    int64_t c, row, column;
  };

  // Packs the kernels of `count` output channels as [a kernel's elements][lanes]. Dense kernels keep the order in which
  // they lie in memory.
  KernelStrides pack_kernels(int64_t first, int64_t count, int64_t lanes, T* taps) const {
    const Tensor& weight = call.weight;
    const KernelStrides given = {weight.stride[1], weight.stride[2], weight.stride[3]};
    const KernelStrides nchw = {kKernelTaps, kKernelSide, 1}, nhwc = {1, kKernelSide * c, c};
    const auto same = [&](const KernelStrides& other) {
      return given.c == other.c && given.row == other.row && given.column == other.column;
    };
    if (same(nchw) || same(nhwc)) {
      pack(at(weight, first * weight.stride[0]), weight.dtype, kKernelTaps * c, count, 1, weight.stride[0], taps,
           lanes);
      return given;
    }
    for (int64_t channel = 0; channel < c; ++channel)
      for (int64_t row = 0; row < kKernelSide; ++row)
        pack(at(weight, first * weight.stride[0] + channel * weight.stride[1] + row * weight.stride[2]), weight.dtype,
             kKernelSide, count, weight.stride[3], weight.stride[0], taps + (row * nhwc.row + channel) * lanes,
             c * lanes);
    return nhwc;
  }

  // Of `some` blocks, in a workspace for so many.
  void prepare(void* workspace, Span some, bool transformed) {
    at_once = some;
    weights = static_cast<T*>(workspace);
    bias = weights + some.size() * block_elements();
    if (!transformed) for_each_task(some.size(), call.threads, [&](int64_t place) { return transform_weights(place); });
    largest_input = largest_safe_input(maxima(), 2 * some.size(), kGrowth * c);
  }
};

}  // namespace
}  // namespace FASTSEG_ISA
}  // namespace fastseg

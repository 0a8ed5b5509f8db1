// conv_relu_pool2d by Winograd's algorithm: 3x3 convolutions under 2x2 pools. A pooling window is one tile of
// Winograd's output, so that it is pooled in registers and nothing of full resolution is stored that wasn't asked for.
// Also serves conv2d alone, without ReLU and pool; its gradients are those of conv_relu_pool2d where they are dense (of
// a skip, or where nothing is pooled).
#include "convolution/conv_relu_pool2d.h"
#include "convolution/kept_weights-inl.h"
#include "convolution/winograd_channels-inl.h"
#include "convolution/winograd_planes-inl.h"
#include "convolution/winograd_stem-inl.h"
#include "convolution/winograd_weight-inl.h"
#include "convolution/winograd_windows-inl.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

// Whether it did.
template <class Kernel>
bool run(Kernel& kernel, bool safe) {
  kernel.safe = &safe;
  if (safe) for_each_task(kernel.tasks(), kernel.call.threads, [&](int64_t task) { return kernel.run(task); });
  return safe;
}

template <class Kernel>
bool forward(const ConvReluPool2dWinogradForward& call) {
  Kernel kernel(call);
  if (kernel.tasks() == 0) return true;
  Workspace workspace(kernel.workspace_elements() * int64_t{sizeof(*kernel.weights)});
  kernel.prepare(workspace.data());
  return run(kernel, kernel.largest_input >= 0);
}

template <class T>
int64_t kept_bytes(const WinogradKernels<T>& kernels) {
  return int64_t{sizeof(KeptHeader)} + kernels.workspace_elements(kernels.blocks) * int64_t{sizeof(T)};
}

// With transformed weights of some output channels at a time.
template <class T, class Kernel>
bool run_in_passes(Kernel& kernel) {
  const WinogradKernels<T>& kernels = kernel.kernels;
  const int64_t step = kernels.pass_blocks(), bytes = kernels.workspace_elements(step) * int64_t{sizeof(T)};
  Workspace workspace(bytes);
  advise_huge_pages(workspace.data(), bytes);  // fresh at every call
  bool safe = true;
  for (int64_t begin = 0; safe && begin < kernels.blocks; begin += step) {
    kernel.prepare(workspace.data(), {begin, min_of(begin + step, kernels.blocks)});
    safe = run(kernel, kernels.largest_input >= 0);
  }
  return safe;
}

// With transformed weights that stay. Calls at the same time write the same numbers there.
template <class T, class Kernel>
bool run_keeping(Kernel& kernel) {
  const ConvReluPool2dWinogradForward& call = kernel.kernels.call;
  KeptHeader* header = static_cast<KeptHeader*>(call.kept.data);
  const int64_t blocks = kernel.kernels.blocks, elements = kernel.kernels.workspace_elements(blocks);
  const uint64_t fingerprint = fingerprint_of(call.weight, call.bias, call.scale, call.stamp, call.threads);
  const KeptHeader wanted = {fingerprint, elements, kLanes<T>};
  const bool transformed =
      header->fingerprint == wanted.fingerprint && header->elements == wanted.elements && header->lanes == wanted.lanes;
  if (!transformed) advise_huge_pages(header, call.kept.size[0]);  // each call reads all of it, page after page
  kernel.prepare(header + 1, {0, blocks}, transformed);
  if (!transformed) *header = wanted;
  return run(kernel, kernel.kernels.largest_input >= 0);
}

template <class T, class Kernel>
bool forward_of_many_channels(const ConvReluPool2dWinogradForward& call) {
  Kernel kernel(call);
  if (kernel.empty()) return true;
  const bool keeps = call.kept && call.kept.size[0] >= kept_bytes(kernel.kernels);  // less: for other vectors
  return keeps ? run_keeping<T>(kernel) : run_in_passes<T>(kernel);
}

template <class T>
bool forward_of_many_channels(const ConvReluPool2dWinogradForward& call) {
  return WinogradPlanes<T>::serves(call) ? forward_of_many_channels<T, WinogradPlanes<T>>(call)
                                         : forward_of_many_channels<T, WinogradChannels<T>>(call);
}

template <class T>
bool forward_of(const ConvReluPool2dWinogradForward& call) {
  if (call.weight.size[2] == kStemKernel) return forward<WinogradStem<T>>(call);
  const bool all_channels = call.skip || call.geometry.pool_size[0] != kPoolSide || call.input.size[1] > kFewChannels;
  if (!all_channels) return forward<WinogradWindows<T>>(call);
  return forward_of_many_channels<T>(call);
}

// The gradient of the input is a convolution too: of grad_output, by the kernels turned by 180 degrees, with output
// channels for input channels.
ConvReluPool2dWinogradForward input_gradient(const Conv2dWinogradBackward& call) {
  ConvReluPool2dWinogradForward result = {};
  result.input = call.grad_output;
  result.passed = call.passed;
  result.weight = call.weight;
  result.weight.size[0] = call.weight.size[1], result.weight.size[1] = call.weight.size[0];
  result.weight.stride[0] = call.weight.stride[1], result.weight.stride[1] = call.weight.stride[0];
  ConvPoolGeometry& g = result.geometry;
  for (int i = 0; i < 2; ++i) {
    const int64_t step = call.weight.stride[2 + i];
    result.weight.data = at_mutable(result.weight, (kKernelSide - 1) * step);
    result.weight.stride[2 + i] = -step;
    g.padding[i] = kKernelSide - 1 - call.padding[i];
    g.stride[i] = g.dilation[i] = g.pool_size[i] = g.pool_stride[i] = 1;
  }
  result.output = call.grad_input;
  result.relu = false;
  result.threads = call.threads;
  return result;
}

template <class T>
bool backward_of(const Conv2dWinogradBackward& call) {
  if (call.grad_input && !forward_of_many_channels<T>(input_gradient(call))) return false;
  return !(call.grad_weight || call.grad_bias) || WinogradWeight<T>(call).run_all();
}

}  // namespace

void conv_relu_pool2d_winograd_forward(const ConvReluPool2dWinogradForward& call) {
  *call.done = call.input.dtype == DType::kFloat64 ? forward_of<double>(call) : forward_of<float>(call);
}

void conv2d_winograd_kept_bytes(const Conv2dWinogradKeptBytes& call) {
  ConvReluPool2dWinogradForward forward = {};
  forward.weight = call.weight;
  const bool is_double = call.weight.dtype == DType::kFloat64;
  *call.bytes = is_double ? kept_bytes(WinogradKernels<double>(forward)) : kept_bytes(WinogradKernels<float>(forward));
}

void conv2d_weights_fingerprint(const Conv2dWeightsFingerprint& call) {
  *call.fingerprint = fingerprint_of(call.weight, {}, call.scale, call.stamp, call.threads);
}

void conv2d_winograd_backward(const Conv2dWinogradBackward& call) {
  *call.done = call.input.dtype == DType::kFloat64 ? backward_of<double>(call) : backward_of<float>(call);
}

}  // namespace FASTSEG_ISA
}  // namespace fastseg

// conv_relu_pool2d, backward, the direct algorithm. The gradient after a pool is sparse: at most one position of a
// window carries any. So per pooled pixel and channel there is one patch of the input to weigh, not one for every
// position, and the dense gradient of the full-resolution map is never built.
//
//   grad_weight[k] = sum over windows of grad_output[k] * patch(position of the maximum)
//   grad_input     = sum over windows and k of grad_output[k] * weight[k], added where that patch lies
#include "convolution/conv_relu_pool2d.h"
#include "convolution/conv_relu_pool2d_backward_input-inl.h"
#include "convolution/conv_relu_pool2d_backward_weight-inl.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

template <class T>
void backward(const ConvReluPool2dBackward& call) {
  if (call.grad_weight || call.grad_bias) BackwardWeight<T>(call).run_all();
  if (call.grad_input) BackwardInput<T>(call).run_all();
}

}  // namespace

void conv_relu_pool2d_backward(const ConvReluPool2dBackward& call) {
  call.input.dtype == DType::kFloat64 ? backward<double>(call) : backward<float>(call);
}

}  // namespace FASTSEG_ISA
}  // namespace fastseg

// Instance normalisation for Python; see core/bindings.h.
#include "core/bindings.h"

#include "core/parallel.h"
#include "normalization/instance_norm.h"

namespace fastseg {
namespace python {
namespace {

bool lies_in_pixels(const Tensor& map) {
  return map.stride[1] == 1 && map.size[1] > 1 && map.size[2] > 1;
}

// A map of the input's dtype and shape that lies in one piece, in one of two ways.
void check_map(const Tensor& map, const Tensor& input, bool in_pixels) {
  const int64_t channels = input.size[1], values = input.size[2];
  const int64_t strides[3] = {channels * values, in_pixels ? 1 : values, in_pixels ? channels : 1};
  bool fits = map.dtype == input.dtype && same_shape(map, input);
  for (int i = 0; i < 3; ++i) fits = fits && (map.size[i] <= 1 || map.stride[i] == strides[i]);
  require(fits, "maps have one dtype and shape, and lie in planes or pixels");
}

// A map [N, C, d1, ...] in one piece as [N, C, S].
void flatten(Tensor& map) {
  require(map.ndim >= 3, "a map is [N, C, d1, ...]");
  for (int i = 3; i < map.ndim; ++i) {
    require(map.size[2] == 1 || map.size[i] == 1 || map.stride[2] == map.size[i] * map.stride[i],
            "a map lies in one piece");
    map.stride[2] = map.size[i] > 1 ? map.stride[i] : map.stride[2];
    map.size[2] *= map.size[i];
  }
  map.ndim = 3;
}

void check(InstanceNorm& call) {
  require(call.input.dtype == DType::kFloat32 || call.input.dtype == DType::kFloat64, "float32 or float64");
  call.in_pixels = lies_in_pixels(call.input);
  check_map(call.input, call.input, call.in_pixels);
  const int64_t images = call.input.size[0], channels = call.input.size[1];
  for (const Tensor* each : {&call.weight, &call.bias})
    require(!*each || (is_tensor(*each, call.input.dtype, {channels}) && is_dense(*each)), "weight and bias are [C]");
  require(is_tensor(call.statistics, call.input.dtype, {2, images, channels}) && is_dense(call.statistics),
          "statistics are [2, N, C]");
}

void instance_norm_forward(const py::tuple& tensors, double eps, double negative_slope, int threads) {
  InstanceNormForward call;
  read_tensors(tensors, {&call.input, &call.weight, &call.bias, &call.statistics, &call.output});
  call.eps = eps, call.negative_slope = negative_slope, call.threads = threads;
  for (Tensor* map : {&call.input, &call.output}) flatten(*map);
  check(call);
  check_map(call.output, call.input, false);
  const py::gil_scoped_release release;
  advise_huge_pages(call.output.data, byte_span(call.output));
  fastseg::instance_norm_forward(call);
}

void instance_norm_backward(const py::tuple& tensors, double negative_slope, int threads) {
  InstanceNormBackward call;
  read_tensors(tensors, {&call.input, &call.weight, &call.bias, &call.statistics, &call.grad_output, &call.grad_input,
                         &call.sums});
  call.negative_slope = negative_slope, call.threads = threads;
  for (Tensor* map : {&call.input, &call.grad_output, &call.grad_input}) flatten(*map);
  check(call);
  call.gradient_in_pixels = call.in_pixels && lies_in_pixels(call.grad_output);
  check_map(call.grad_input, call.input, call.in_pixels);
  check_map(call.grad_output, call.input, call.gradient_in_pixels);
  require(is_tensor(call.sums, call.input.dtype, {2, call.input.size[0], call.input.size[1]}) && is_dense(call.sums),
          "sums are [2, N, C]");
  const py::gil_scoped_release release;
  advise_huge_pages(call.grad_input.data, byte_span(call.grad_input));
  fastseg::instance_norm_backward(call);
}

}  // namespace

void bind_instance_norm(py::module_& m) {
  m.def("instance_norm_forward", &instance_norm_forward);
  m.def("instance_norm_backward", &instance_norm_backward);
}

}  // namespace python
}  // namespace fastseg

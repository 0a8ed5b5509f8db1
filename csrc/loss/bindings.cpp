// cross_entropy and upsample_cross_entropy for Python.
#include "loss/bindings.h"

#include <limits>
#include <string>

#include "core/parallel.h"
#include "loss/cross_entropy.h"
#include "loss/upsample_cross_entropy.h"

namespace fastseg {
namespace python {  // the functions' names are the kernels' names
namespace {

// Whether tensor is of shape [leading, then all of input's sizes but the classes'].
bool is_per_pixel(const Tensor& tensor, const Tensor& input, int leading) {
  if (tensor.ndim != input.ndim - 1 + leading) return false;
  for (int i = leading; i < tensor.ndim; ++i)
    if (tensor.size[i] != input.size[i == leading ? 0 : i - leading + 1]) return false;
  return true;
}

// What both operators ask of a call, but for the sizes of what has a value per pixel.
void check_call(const CrossEntropy& call) {
  const Tensor& input = call.input;
  const DType accumulated = input.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  require(input.ndim >= 2 && is_floating(input), "input is a floating-point [N, C, d1, ...]");
  require(input.size[1] >= 1 && input.size[1] <= std::numeric_limits<int32_t>::max(),
          "input has 1 to 2^31 - 1 classes");
  require(!call.weight || (call.weight.ndim == 1 && call.weight.size[0] == input.size[1] && is_dense(call.weight) &&
                           call.weight.dtype == accumulated),
          "weight is a dense [C], float64 where input is, else float32");
  require(is_dense(call.statistics) && call.statistics.dtype == accumulated,
          "statistics are dense, float64 where input is, else float32");
  require(call.total_weight && call.total_weight.ndim == 0 && call.total_weight.dtype == accumulated,
          "total_weight is a number, float64 where input is, else float32");
  require(call.reduction >= Reduction::kNone && call.reduction <= Reduction::kSum, "unknown reduction");
}

template <class Call>
Call read_cross_entropy(const py::object& input, const py::object& target, const py::object& weight,
                        const py::object& statistics, const py::object& total_weight, int64_t ignore_index,
                        int reduction, double label_smoothing, int threads) {
  Call call;
  call.input = from_python(input);
  call.target = from_python(target);
  call.weight = from_python(weight);
  call.statistics = from_python(statistics);
  call.total_weight = from_python(total_weight);
  call.ignore_index = ignore_index;
  call.reduction = static_cast<Reduction>(reduction);
  call.label_smoothing = label_smoothing;
  call.threads = threads;
  check_call(call);
  return call;
}

void check_grad_input(const CrossEntropyBackward& call) {
  require(same_shape(call.grad_input, call.input) && call.grad_input.dtype == call.input.dtype,
          "grad_input has input's shape and dtype");
  advise_huge_pages(call.grad_input.data, byte_span(call.grad_input));
}

// ---- cross_entropy ----

void check_pixels(const CrossEntropy& call) {
  const Tensor &input = call.input, &target = call.target;
  if (is_floating(target)) {
    require(same_shape(target, input), "class probabilities have input's shape");
    require((target.dtype == DType::kFloat64) == (input.dtype == DType::kFloat64),
            "class probabilities are float64 where input is, and only there");
  } else {
    require(is_per_pixel(target, input, 0), "target is [N, d1, ...]");
  }
  require(is_per_pixel(call.statistics, input, 1) && call.statistics.size[0] == 2, "statistics are [2, N, d1, ...]");
}

// The loss, or its gradient: a value per pixel without a reduction, else one.
void check_loss(const Tensor& loss, const CrossEntropy& call) {
  const bool fits = call.reduction == Reduction::kNone ? is_per_pixel(loss, call.input, 0) : loss && loss.ndim == 0;
  require(fits && loss.dtype == call.total_weight.dtype, "the loss has a value per pixel, or one; statistics' dtype");
}

void cross_entropy_forward(const py::object& input, const py::object& target, const py::object& weight,
                           const py::object& loss, const py::object& statistics, const py::object& total_weight,
                           int64_t ignore_index, int reduction, double label_smoothing, int threads) {
  auto call = read_cross_entropy<CrossEntropyForward>(input, target, weight, statistics, total_weight, ignore_index,
                                                      reduction, label_smoothing, threads);
  call.loss = from_python(loss);
  check_pixels(call);
  check_loss(call.loss, call);
  require(is_dense(call.loss), "the loss is dense");
  run_with_labels(call, fastseg::cross_entropy_forward);
}

void cross_entropy_backward(const py::object& grad_output, const py::object& input, const py::object& target,
                            const py::object& weight, const py::object& statistics, const py::object& total_weight,
                            const py::object& grad_input, int64_t ignore_index, int reduction, double label_smoothing,
                            int threads) {
  auto call = read_cross_entropy<CrossEntropyBackward>(input, target, weight, statistics, total_weight, ignore_index,
                                                       reduction, label_smoothing, threads);
  call.grad_output = from_python(grad_output);
  call.grad_input = from_python(grad_input);
  check_pixels(call);
  check_loss(call.grad_output, call);
  check_grad_input(call);
  run_with_labels(call, fastseg::cross_entropy_backward);
}

// ---- upsample_cross_entropy ----

// `loss` is the loss or its gradient, `overlap` the overlap or its gradient.
void check_upsampled(const CrossEntropy& call, const Tensor& loss, const Tensor& overlap) {
  const Tensor &input = call.input, &target = call.target, &statistics = call.statistics;
  check_map(input, target);
  require(statistics.ndim == 4 && statistics.size[0] == 2, "statistics are [2, N, H, W]");
  for (int i = 1; i < 3; ++i) require(statistics.size[i + 1] == target.size[i], "statistics are [2, N, H, W]");
  const bool fits = call.reduction == Reduction::kNone ? same_shape(loss, target) : loss && loss.ndim == 0;
  require(fits && loss.dtype == statistics.dtype, "the loss has a value per label, or one; statistics' dtype");
  require(overlap.ndim == 3 && (overlap.size[0] == 0 || overlap.size[0] == 3) && overlap.size[1] == input.size[0] &&
              overlap.size[2] == input.size[1] && overlap.dtype == statistics.dtype,
          "the overlap is [3 or 0, N, C], of statistics' dtype");
}

void upsample_cross_entropy_forward(const py::object& input, const py::object& target, const py::object& weight,
                                    const py::object& loss, const py::object& statistics,
                                    const py::object& total_weight, const py::object& overlap,
                                    const py::object& gradient, int64_t ignore_index, int reduction,
                                    double label_smoothing, int mode, bool align_corners, double step_h, double step_w,
                                    int threads) {
  auto call = read_cross_entropy<UpsampleCrossEntropyForward>(input, target, weight, statistics, total_weight,
                                                              ignore_index, reduction, label_smoothing, threads);
  call.loss = from_python(loss);
  call.overlap = from_python(overlap);
  call.gradient = from_python(gradient);
  call.grid = read_grid(mode, align_corners, step_h, step_w);
  check_upsampled(call, call.loss, call.overlap);
  require(is_dense(call.loss) && is_dense(call.overlap), "loss and overlap are dense");
  require(call.statistics.size[1] == (call.gradient ? 0 : call.target.size[0]), "statistics, or the gradient");
  require(!call.gradient || (same_shape(call.gradient, call.input) && call.gradient.dtype == call.statistics.dtype &&
                             call.reduction != Reduction::kNone && call.overlap.size[0] == 0),
          "a gradient has input's shape and statistics' dtype; a loss that isn't reduced, or the overlap, has none");
  run_with_labels(call, fastseg::upsample_cross_entropy_forward);
}

void upsample_cross_entropy_backward(const py::object& grad_loss, const py::object& grad_overlap,
                                     const py::object& input, const py::object& target, const py::object& weight,
                                     const py::object& statistics, const py::object& total_weight,
                                     const py::object& grad_input, int64_t ignore_index, int reduction,
                                     double label_smoothing, int mode, bool align_corners, double step_h, double step_w,
                                     int threads) {
  auto call = read_cross_entropy<UpsampleCrossEntropyBackward>(input, target, weight, statistics, total_weight,
                                                               ignore_index, reduction, label_smoothing, threads);
  call.grad_output = from_python(grad_loss);
  call.grad_overlap = from_python(grad_overlap);
  call.grad_input = from_python(grad_input);
  call.grid = read_grid(mode, align_corners, step_h, step_w);
  check_upsampled(call, call.grad_output, call.grad_overlap);
  require(call.statistics.size[1] == call.target.size[0], "statistics are [2, N, H, W]");
  check_grad_input(call);
  run_with_labels(call, fastseg::upsample_cross_entropy_backward);
}

}  // namespace

void bind_cross_entropy(py::module_& m) {
  m.def("cross_entropy_forward", &cross_entropy_forward);
  m.def("cross_entropy_backward", &cross_entropy_backward);
}

void bind_upsample_cross_entropy(py::module_& m) {
  m.def("upsample_cross_entropy_forward", &upsample_cross_entropy_forward);
  m.def("upsample_cross_entropy_backward", &upsample_cross_entropy_backward);
}

}  // namespace python
}  // namespace fastseg

// The pixel losses for Python. A call's tensors come in one tuple, in the order in which the
// binding reads them, since names for them would cost a call 1 us (2 cores, AVX-512, 2026-11-26); its options by name,
// as fastseg.ops.losses.options.LossOptions has them. Of what Python has checked, the checks here repeat what memory
// depends on.
#include "loss/bindings.h"

#include <limits>
#include <string>

#include "core/parallel.h"
#include "loss/cross_entropy.h"
#include "loss/upsample_cross_entropy.h"
#include "loss/upsample_sigmoid_sums.h"

namespace fastseg {
namespace python {  // the functions' names are the kernels' names
namespace {

DType accumulation_dtype(const Tensor& input) {
  return input.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

Reduction read_reduction(const std::string& name) {
  require(name == "none" || name == "mean" || name == "sum", "unknown reduction");
  return name == "none" ? Reduction::kNone : name == "mean" ? Reduction::kMean : Reduction::kSum;
}

// Reads the options, and checks the tensors that all calls have.
void read_options(const py::object& options, int threads, CrossEntropy* read) {
  CrossEntropy& call = *read;
  call.ignore_index = options.attr("ignore_index").cast<int64_t>();
  call.reduction = read_reduction(options.attr("reduction").cast<std::string>());
  call.label_smoothing = options.attr("label_smoothing").cast<double>();
  call.threads = threads;
  const Tensor &input = call.input, &weight = call.weight, &total_weight = call.total_weight;
  require(input.ndim >= 2 && is_floating(input), "input is a floating-point [N, C, d1, ...]");
  require(input.size[1] >= 1 && input.size[1] <= std::numeric_limits<int32_t>::max(),
          "input has 1 to 2^31 - 1 classes");
  require(!weight || (weight.ndim == 1 && weight.size[0] == input.size[1] && is_dense(weight) &&
                      weight.dtype == accumulation_dtype(input)),
          "weight is a dense [C], float64 where input is, else float32");
  require(total_weight && total_weight.ndim == 0 && total_weight.dtype == accumulation_dtype(input),
          "total_weight is a number, float64 where input is, else float32");
}

// The sizes of what has one value per pixel: input's but for the classes.
Tensor pixels_of(const Tensor& input) {
  Tensor pixels;
  pixels.ndim = input.ndim - 1;
  for (int i = 0; i < pixels.ndim; ++i) pixels.size[i] = input.size[i == 0 ? 0 : i + 1];
  return pixels;
}

// `pixels` has the sizes of what has one value per pixel.
void check_statistics(const CrossEntropy& call, const Tensor& pixels) {
  const Tensor& statistics = call.statistics;
  bool fits = statistics.ndim == pixels.ndim + 1 && statistics.size[0] == 2;
  for (int i = 0; i < pixels.ndim; ++i) fits = fits && statistics.size[i + 1] == pixels.size[i];
  require(fits && is_dense(statistics) && statistics.dtype == accumulation_dtype(call.input),
          "statistics are a dense [2, N, d1, ...], float64 where input is, else float32");
}

// The loss, or its gradient.
void check_loss(const Tensor& loss, const CrossEntropy& call, const Tensor& pixels) {
  const bool fits = call.reduction == Reduction::kNone ? same_shape(loss, pixels) : loss && loss.ndim == 0;
  require(fits && loss.dtype == accumulation_dtype(call.input),
          "the loss has a value per pixel, or one; float64 where input is, else float32");
}

void check_grad_input(const Tensor& grad_input, const Tensor& input) {
  require(same_shape(grad_input, input) && grad_input.dtype == input.dtype, "grad_input has input's shape and dtype");
  advise_huge_pages(grad_input.data, byte_span(grad_input));
}

// ---- cross_entropy ----

void check_pixels(const CrossEntropy& call, const Tensor& loss) {
  const Tensor &input = call.input, &target = call.target, pixels = pixels_of(input);
  require(same_shape(target, is_floating(target) ? input : pixels),
          "target is labels [N, d1, ...], or class probabilities of input's shape");
  require(!is_floating(target) || (target.dtype == DType::kFloat64) == (input.dtype == DType::kFloat64),
          "class probabilities are float64 where input is, and only there");
  check_loss(loss, call, pixels);
}

void cross_entropy_forward(const py::tuple& tensors, const py::object& options, int threads) {
  CrossEntropyForward call;
  read_tensors(tensors, {&call.input, &call.target, &call.weight, &call.loss, &call.statistics, &call.total_weight});
  read_options(options, threads, &call);
  check_pixels(call, call.loss);
  if (call.statistics) check_statistics(call, pixels_of(call.input));
  require(is_dense(call.loss), "the loss is dense");
  run_with_labels(call, fastseg::cross_entropy_forward);
}

void cross_entropy_backward(const py::tuple& tensors, const py::object& options, int threads) {
  CrossEntropyBackward call;
  read_tensors(tensors, {&call.grad_output, &call.input, &call.target, &call.weight, &call.statistics,
                         &call.total_weight, &call.grad_input});
  read_options(options, threads, &call);
  check_pixels(call, call.grad_output);
  check_statistics(call, pixels_of(call.input));
  check_grad_input(call.grad_input, call.input);
  run_with_labels(call, fastseg::cross_entropy_backward);
}

// ---- upsample_cross_entropy ----

// The overlap, or its gradient.
void check_overlap(const Tensor& overlap, const Tensor& input) {
  require(overlap.ndim == 3 && overlap.size[0] == 3 && overlap.size[1] == input.size[0] &&
              overlap.size[2] == input.size[1] && overlap.dtype == accumulation_dtype(input),
          "the overlap is [3, N, C], float64 where input is, else float32");
}

void upsample_cross_entropy_forward(const py::tuple& tensors, const py::object& options, const py::object& upsampling,
                                    int threads) {
  UpsampleCrossEntropyForward call;
  read_tensors(tensors, {&call.input, &call.target, &call.weight, &call.loss, &call.statistics, &call.total_weight,
                         &call.overlap, &call.gradient});
  read_options(options, threads, &call);
  call.grid = read_upsampling(upsampling, call.input);
  check_map(call.input, call.target);
  check_loss(call.loss, call, call.target);
  require(is_dense(call.loss) && is_dense(call.overlap), "loss and overlap are dense");
  if (call.statistics) check_statistics(call, call.target);
  if (call.overlap) check_overlap(call.overlap, call.input);
  if (call.gradient) {
    require(same_shape(call.gradient, call.input) && call.gradient.dtype == accumulation_dtype(call.input),
            "the gradient has input's shape, and is float64 where input is, else float32");
    require(call.reduction != Reduction::kNone && !call.statistics && !call.overlap,
            "with the gradient the loss is reduced, and there are neither statistics nor overlap");
  }
  run_with_labels(call, fastseg::upsample_cross_entropy_forward);
}

void upsample_cross_entropy_backward(const py::tuple& tensors, const py::object& options, const py::object& upsampling,
                                     int threads) {
  UpsampleCrossEntropyBackward call;
  read_tensors(tensors, {&call.grad_output, &call.grad_overlap, &call.input, &call.target, &call.weight,
                         &call.statistics, &call.total_weight, &call.grad_input});
  read_options(options, threads, &call);
  call.grid = read_upsampling(upsampling, call.input);
  check_map(call.input, call.target);
  check_statistics(call, call.target);
  check_loss(call.grad_output, call, call.target);
  if (call.grad_overlap) check_overlap(call.grad_overlap, call.input);
  check_grad_input(call.grad_input, call.input);
  run_with_labels(call, fastseg::upsample_cross_entropy_backward);
}

// ---- upsample_sigmoid_sums ----

void read_sigmoid_options(const py::object& options, const py::object& upsampling, int threads,
                          UpsampleSigmoidSums* read) {
  UpsampleSigmoidSums& call = *read;
  const auto number = [&](const char* name) {
    const py::object value = options.attr(name);
    return value.is_none() ? 0.0 : value.cast<double>();
  };
  call.ignore_index = options.attr("ignore_index").cast<int64_t>();
  call.gamma = number("gamma");
  call.threshold = number("threshold");
  call.smaller = options.attr("smaller").cast<bool>();
  call.grid = read_upsampling(upsampling, call.input);
  call.threads = threads;
  const Tensor &input = call.input, &target = call.target, &sums = call.sums;
  const bool of_labels = target.ndim == 3;
  Tensor pixels = of_labels ? target : pixels_of(target);
  if (!of_labels) pixels.dtype = DType::kInt64;  // as labels would be
  check_map(input, pixels);
  require(of_labels || (target.ndim == 4 && target.size[1] == input.size[1]), "shares have input's classes");
  require(of_labels || !is_floating(target) || (target.dtype == DType::kFloat64) == (input.dtype == DType::kFloat64),
          "shares are float64 where input is, and only there");
  require(sums.ndim == 3 && sums.size[0] == (options.attr("gamma").is_none() ? 3 : 6) &&
              sums.size[1] == input.size[0] && sums.size[2] == input.size[1] && sums.dtype == accumulation_dtype(input),
          "the sums are [3 or 6, N, C], float64 where input is, else float32");
  require(!call.smaller || sums.size[0] == 3, "the smaller of p and t goes into class sums alone");
}

void upsample_sigmoid_sums_forward(const py::tuple& tensors, const py::object& options, const py::object& upsampling,
                                   int threads) {
  UpsampleSigmoidSums call;
  read_tensors(tensors, {&call.input, &call.target, &call.sums});
  read_sigmoid_options(options, upsampling, threads, &call);
  require(is_dense(call.sums), "the sums are dense");
  run_with_labels(call, fastseg::upsample_sigmoid_sums_forward);
}

void upsample_sigmoid_sums_backward(const py::tuple& tensors, const py::object& options, const py::object& upsampling,
                                    int threads) {
  UpsampleSigmoidSumsBackward call;
  read_tensors(tensors, {&call.sums, &call.input, &call.target, &call.grad_input});
  read_sigmoid_options(options, upsampling, threads, &call);
  check_grad_input(call.grad_input, call.input);
  run_with_labels(call, fastseg::upsample_sigmoid_sums_backward);
}

}  // namespace

void bind_cross_entropy(py::module_& m) {
  m.def("cross_entropy_forward", &cross_entropy_forward);
  m.def("cross_entropy_backward", &cross_entropy_backward);
  m.attr("IGNORE_NONE") = kIgnoreNone;
}

void bind_upsample_cross_entropy(py::module_& m) {
  m.def("upsample_cross_entropy_forward", &upsample_cross_entropy_forward);
  m.def("upsample_cross_entropy_backward", &upsample_cross_entropy_backward);
  m.def("upsample_sigmoid_sums_forward", &upsample_sigmoid_sums_forward);
  m.def("upsample_sigmoid_sums_backward", &upsample_sigmoid_sums_backward);
}

}  // namespace python
}  // namespace fastseg

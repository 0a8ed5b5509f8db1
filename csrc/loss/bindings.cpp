// The losses, and the predictions of upsampled logits, for Python. A call's tensors come in one tuple, in the order in
// which the binding reads them, since names for them would cost a call 1 us (2 cores, AVX-512, 2026-11-26); a loss'
// options by name, as fastseg.ops.losses.options.LossOptions has them. Of what Python has checked, the checks here
// repeat what memory depends on.
#include "core/bindings.h"

#include <limits>
#include <string>

#include "core/parallel.h"
#include "loss/losses.h"
#include "upsampling/predictions.h"

namespace fastseg {
namespace python {  // the functions' names are the kernels' names
namespace {

// Whether there is anything along a tensor's dimensions from `first` on.
bool has_extent(const Tensor& tensor, int first) {
  for (int i = first; i < tensor.ndim; ++i)
    if (tensor.size[i] <= 0) return false;
  return true;
}

DType accumulation_dtype(const Tensor& input) {
  return input.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

// Logits [N, C, h, w].
void check_logits(const Tensor& input) {
  require(input.ndim == 4 && is_floating(input) && has_extent(input, 1),
          "input is a floating-point [N, C, h, w] with classes, rows and columns");
}

// Logits [N, C, h, w] or [N, C, d, h, w] and, of the output's size, labels [N, H, W] or [N, D, H, W].
void check_map(const Tensor& input, const Tensor& labels) {
  require((input.ndim == 4 || input.ndim == 5) && is_floating(input) && has_extent(input, 1),
          "input is a floating-point [N, C, h, w] or [N, C, d, h, w] with classes and pixels");
  require(
      labels.ndim == input.ndim - 1 && !is_floating(labels) && labels.size[0] == input.size[0] && has_extent(labels, 1),
      "labels are integers [N, H, W] or [N, D, H, W] with pixels");
}

// From fastseg.ops.upsampling.Upsampling, of a grid for input.
Upsampling read_upsampling(const py::object& upsampling, const Tensor& input) {
  const auto mode = upsampling.attr("mode").cast<std::string>();
  const py::tuple steps = upsampling.attr("steps");
  require(mode == "nearest" || mode == "bilinear" || mode == "trilinear", "a mode is known");
  require(static_cast<int>(steps.size()) == input.ndim - 2 && (input.ndim == 4 || input.ndim == 5),
          "each axis has a step");
  Upsampling grid = {
      mode == "nearest" ? Mode::kNearest : Mode::kLinear, upsampling.attr("align_corners").cast<bool>(), {1, 1, 1}};
  for (int axis = 0; axis < input.ndim - 2; ++axis) {
    double& step = grid.step[axis + 5 - input.ndim];
    step = steps[axis].cast<double>();
    require(step >= 0, "a step is not negative");
  }
  return grid;
}

// Runs a kernel without the interpreter lock; raises an IndexError for a label that is neither a class nor ignored.
template <class Call>
void run_with_labels(Call& call, void (*kernel)(const Call&)) {
  InvalidLabel invalid = {};
  call.invalid = &invalid;
  {
    py::gil_scoped_release unlocked;
    kernel(call);
  }
  if (!invalid.found) return;
  const std::string ignored =
      call.ignore_index == kIgnoreNone ? "" : " or ignore_index (" + std::to_string(call.ignore_index) + ")";
  throw py::index_error("target: expected classes in [0, " + std::to_string(call.input.size[1]) + ")" + ignored +
                        ", got " + std::to_string(invalid.value));
}

// ---- losses ----

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
  const DType accumulation = accumulation_dtype(input);
  require(input.ndim >= 2 && is_floating(input), "input is a floating-point [N, C, d1, ...]");
  require(input.size[1] >= 1 && input.size[1] <= std::numeric_limits<int32_t>::max(),
          "input has 1 to 2^31 - 1 classes");
  require(!weight || (is_tensor(weight, accumulation, {input.size[1]}) && is_dense(weight)),
          "weight is a dense [C], float64 where input is, else float32");
  require(total_weight && is_tensor(total_weight, accumulation, {}),
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
  require(is_tensor(overlap, accumulation_dtype(input), {3, input.size[0], input.size[1]}),
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
  const int64_t sum_count = options.attr("gamma").is_none() ? 3 : 6;
  require(is_tensor(sums, accumulation_dtype(input), {sum_count, input.size[0], input.size[1]}),
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

// ---- predictions ----

void upsample_argmax(const py::tuple& tensors, const py::object& upsampling, int threads) {
  UpsampleArgmax call;
  read_tensors(tensors, {&call.input, &call.labels, &call.confidence});
  call.grid = read_upsampling(upsampling, call.input);
  call.threads = threads;
  const Tensor &labels = call.labels, &confidence = call.confidence;
  check_map(call.input, labels);
  require(!confidence || (same_shape(confidence, labels) && confidence.dtype == call.input.dtype),
          "confidence has the labels' shape, and input's dtype");
  require(is_dense(labels) && is_dense(confidence), "labels and confidence are dense");
  py::gil_scoped_release unlocked;
  fastseg::upsample_argmax(call);
}

void upsample_confusion_matrix(const py::tuple& tensors, int64_t ignore_index, const py::object& upsampling,
                               int threads) {
  UpsampleConfusionMatrix call;
  read_tensors(tensors, {&call.input, &call.target, &call.matrix});
  call.ignore_index = ignore_index;
  call.grid = read_upsampling(upsampling, call.input);
  call.threads = threads;
  const int64_t classes = call.input.size[1];
  check_map(call.input, call.target);
  require(is_tensor(call.matrix, DType::kInt64, {classes, classes}) && is_dense(call.matrix),
          "matrix is a dense [C, C] of int64");
  run_with_labels(call, fastseg::upsample_confusion_matrix);
}

void upsample_mask_argmax(const py::tuple& tensors, const py::object& upsampling, int threads) {
  UpsampleMaskArgmax call;
  read_tensors(tensors, {&call.input, &call.class_probabilities, &call.labels});
  call.grid = read_upsampling(upsampling, call.input);
  call.threads = threads;
  const Tensor &input = call.input, &probabilities = call.class_probabilities;
  check_logits(input);
  check_map(input, call.labels);
  const int64_t images = input.size[0], queries = input.size[1], classes = probabilities.size[2];
  require(is_tensor(probabilities, accumulation_dtype(input), {images, queries, classes}) && classes > 0,
          "class_probabilities are [N, Q, C] with classes, float64 where input is, else float32");
  require(is_dense(call.labels), "labels are dense");
  py::gil_scoped_release unlocked;
  fastseg::upsample_mask_argmax(call);
}

void upsample_threshold(const py::tuple& tensors, double bound, const py::object& upsampling, int threads) {
  UpsampleThreshold call;
  read_tensors(tensors, {&call.input, &call.masks, &call.scores, &call.boxes});
  call.bound = bound;
  call.grid = read_upsampling(upsampling, call.input);
  call.threads = threads;
  const Tensor &input = call.input, &masks = call.masks, &scores = call.scores, &boxes = call.boxes;
  check_logits(input);
  const int64_t images = input.size[0], classes = input.size[1], height = masks.size[2], width = masks.size[3];
  const bool fits = is_tensor(masks, DType::kUInt8, {images, classes, height, width}) && is_dense(masks);
  require(fits && height > 0 && width > 0, "masks are a dense [N, C, H, W] of uint8 with rows and columns");
  require(!scores || (is_tensor(scores, input.dtype, {images, classes}) && is_dense(scores)),
          "scores are a dense [N, C] of input's dtype");
  require(!scores || (is_tensor(boxes, DType::kInt64, {images, classes, 4}) && is_dense(boxes)),
          "boxes are a dense [N, C, 4] of int64");
  py::gil_scoped_release unlocked;
  advise_huge_pages(masks.data, masks.size[0] * masks.stride[0]);
  fastseg::upsample_threshold(call);
}

}  // namespace

void bind_losses_and_predictions(py::module_& m) {
  m.def("cross_entropy_forward", &cross_entropy_forward);
  m.def("cross_entropy_backward", &cross_entropy_backward);
  m.attr("IGNORE_NONE") = kIgnoreNone;
  m.def("upsample_cross_entropy_forward", &upsample_cross_entropy_forward);
  m.def("upsample_cross_entropy_backward", &upsample_cross_entropy_backward);
  m.def("upsample_sigmoid_sums_forward", &upsample_sigmoid_sums_forward);
  m.def("upsample_sigmoid_sums_backward", &upsample_sigmoid_sums_backward);
  m.def("upsample_argmax", &upsample_argmax);
  m.def("upsample_confusion_matrix", &upsample_confusion_matrix);
  m.def("upsample_mask_argmax", &upsample_mask_argmax);
  m.def("upsample_threshold", &upsample_threshold);
}

}  // namespace python
}  // namespace fastseg

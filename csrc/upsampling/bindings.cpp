// The upsampling predictions for Python: a call's tensors in one tuple, as the losses'.
#include "loss/bindings.h"

#include "core/parallel.h"
#include "upsampling/upsample_argmax.h"
#include "upsampling/upsample_confusion_matrix.h"
#include "upsampling/upsample_mask_argmax.h"
#include "upsampling/upsample_threshold.h"

namespace fastseg {
namespace python {  // the functions' names are the kernels' names
namespace {

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
  const Tensor& matrix = call.matrix;
  check_map(call.input, call.target);
  require(matrix.ndim == 2 && matrix.size[0] == call.input.size[1] && matrix.size[1] == call.input.size[1] &&
              matrix.dtype == DType::kInt64 && is_dense(matrix),
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
  const DType accumulation = input.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  require(probabilities.ndim == 3 && probabilities.size[0] == input.size[0] && probabilities.size[1] == input.size[1] &&
              probabilities.size[2] > 0 && probabilities.dtype == accumulation,
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
  const bool of_input = masks.ndim == 4 && masks.size[0] == input.size[0] && masks.size[1] == input.size[1];
  require(of_input && masks.size[2] > 0 && masks.size[3] > 0 && masks.dtype == DType::kUInt8 && is_dense(masks),
          "masks are a dense [N, C, H, W] of uint8 with rows and columns");
  require(!scores || (scores.ndim == 2 && scores.size[0] == input.size[0] && scores.size[1] == input.size[1] &&
                      scores.dtype == input.dtype && is_dense(scores)),
          "scores are a dense [N, C] of input's dtype");
  require(!scores || (boxes.ndim == 3 && boxes.size[0] == input.size[0] && boxes.size[1] == input.size[1] &&
                      boxes.size[2] == 4 && boxes.dtype == DType::kInt64 && is_dense(boxes)),
          "boxes are a dense [N, C, 4] of int64");
  py::gil_scoped_release unlocked;
  advise_huge_pages(masks.data, masks.size[0] * masks.stride[0]);
  fastseg::upsample_threshold(call);
}

}  // namespace

void bind_upsample_argmax(py::module_& m) {
  m.def("upsample_argmax", &upsample_argmax);
  m.def("upsample_confusion_matrix", &upsample_confusion_matrix);
  m.def("upsample_mask_argmax", &upsample_mask_argmax);
  m.def("upsample_threshold", &upsample_threshold);
}

}  // namespace python
}  // namespace fastseg

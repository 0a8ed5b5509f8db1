// upsample_argmax and upsample_confusion_matrix for Python.
#include "loss/bindings.h"

#include "upsampling/upsample_argmax.h"
#include "upsampling/upsample_confusion_matrix.h"

namespace fastseg {
namespace python {  // the functions' names are the kernels' names
namespace {

void upsample_argmax(const py::object& input, const py::object& labels, const py::object& confidence, int mode,
                     bool align_corners, double step_h, double step_w, int threads) {
  UpsampleArgmax call;
  call.input = from_python(input);
  call.labels = from_python(labels);
  call.confidence = from_python(confidence);
  call.grid = read_grid(mode, align_corners, step_h, step_w);
  call.threads = threads;
  check_map(call.input, call.labels);
  const Tensor &dense = call.labels, &confident = call.confidence;
  require(confident.ndim == 3 && (confident.size[0] == 0 || same_shape(confident, dense)) &&
              confident.dtype == call.input.dtype,
          "confidence has the labels' shape, or no images, and input's dtype");
  require(is_dense(dense) && is_dense(confident), "labels and confidence are dense");
  py::gil_scoped_release unlocked;
  fastseg::upsample_argmax(call);
}

void upsample_confusion_matrix(const py::object& input, const py::object& target, const py::object& matrix,
                               const py::object& ignore_index, int mode, bool align_corners, double step_h,
                               double step_w, int threads) {
  UpsampleConfusionMatrix call;
  call.input = from_python(input);
  call.target = from_python(target);
  call.matrix = from_python(matrix);
  call.ignore_index = ignore_index.is_none() ? kIgnoreNone : ignore_index.cast<int64_t>();
  call.grid = read_grid(mode, align_corners, step_h, step_w);
  call.threads = threads;
  check_map(call.input, call.target);
  const Tensor& square = call.matrix;
  require(square.ndim == 2 && square.size[0] == call.input.size[1] && square.size[1] == call.input.size[1] &&
              square.dtype == DType::kInt64 && is_dense(square),
          "matrix is a dense [C, C] of int64");
  run_with_labels(call, fastseg::upsample_confusion_matrix);
}

}  // namespace

void bind_upsample_argmax(py::module_& m) {
  m.def("upsample_argmax", &upsample_argmax);
  m.def("upsample_confusion_matrix", &upsample_confusion_matrix);
}

}  // namespace python
}  // namespace fastseg

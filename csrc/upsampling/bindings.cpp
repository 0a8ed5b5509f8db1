// upsample_argmax and upsample_confusion_matrix for Python: a call's tensors in one tuple, as the losses'.
#include "loss/bindings.h"

#include "upsampling/upsample_argmax.h"
#include "upsampling/upsample_confusion_matrix.h"

namespace fastseg {
namespace python {  // the functions' names are the kernels' names
namespace {

void upsample_argmax(const py::tuple& tensors, const py::object& upsampling, int threads) {
  UpsampleArgmax call;
  read_tensors(tensors, {&call.input, &call.labels, &call.confidence});
  call.grid = read_upsampling(upsampling);
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
  call.grid = read_upsampling(upsampling);
  call.threads = threads;
  const Tensor& matrix = call.matrix;
  check_map(call.input, call.target);
  require(matrix.ndim == 2 && matrix.size[0] == call.input.size[1] && matrix.size[1] == call.input.size[1] &&
              matrix.dtype == DType::kInt64 && is_dense(matrix),
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

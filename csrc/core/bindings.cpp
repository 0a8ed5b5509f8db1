// fastseg._C: what Python calls. Every tensor arrives as (address, dtype, sizes, strides) and is checked, in the
// families' bindings.cpp, before a kernel sees it; the interpreter lock is released around the kernels.
#include "core/bindings.h"

#include <stdexcept>
#include <string>
#include <vector>

#include "core/isa.h"

namespace fastseg {
namespace python {

void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(what);
}

Tensor from_python(const py::object& description) {
  Tensor tensor;
  if (description.is_none()) return tensor;
  const auto parts = py::reinterpret_borrow<py::tuple>(description);
  require(py::isinstance<py::tuple>(description) && parts.size() == 4, "a tensor is (address, dtype, sizes, strides)");
  const int code = parts[1].cast<int>();
  require(code >= 0 && code <= static_cast<int>(DType::kInt64), "unknown dtype code");
  tensor.dtype = static_cast<DType>(code);
  const auto sizes = py::reinterpret_borrow<py::tuple>(parts[2]), strides = py::reinterpret_borrow<py::tuple>(parts[3]);
  require(py::isinstance<py::tuple>(parts[2]) && py::isinstance<py::tuple>(parts[3]) && sizes.size() == strides.size(),
          "sizes and strides are tuples of one length");
  require(sizes.size() <= kMaxDims, "a tensor has at most eight dimensions here");
  tensor.ndim = static_cast<int>(sizes.size());
  bool empty = false;
  for (int i = 0; i < tensor.ndim; ++i) {
    tensor.size[i] = sizes[i].cast<int64_t>();
    tensor.stride[i] = strides[i].cast<int64_t>();
    require(tensor.size[i] >= 0 && tensor.stride[i] >= 0, "sizes and strides can't be negative");
    empty = empty || tensor.size[i] == 0;
  }
  tensor.data = reinterpret_cast<void*>(parts[0].cast<uintptr_t>());
  require(empty || tensor.data != nullptr, "a tensor with elements has no memory (fake or meta tensor?)");
  return tensor;
}

void read_tensors(const py::tuple& descriptions, std::initializer_list<Tensor*> tensors) {
  require(descriptions.size() == tensors.size(), "there is a tensor or None for each that the kernel knows");
  size_t next = 0;
  for (Tensor* tensor : tensors) *tensor = from_python(descriptions[next++]);
}

bool is_floating(const Tensor& tensor) {
  return tensor.dtype <= DType::kFloat16;
}

bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.ndim != b.ndim) return false;
  for (int i = 0; i < a.ndim; ++i)
    if (a.size[i] != b.size[i]) return false;
  return true;
}

bool is_tensor(const Tensor& tensor, DType dtype, std::initializer_list<int64_t> sizes) {
  int d = 0;
  bool equal = tensor.dtype == dtype && tensor.ndim == static_cast<int>(sizes.size());
  for (int64_t size : sizes) equal = equal && tensor.size[d++] == size;
  return equal;
}

int64_t byte_span(const Tensor& tensor) {
  int64_t last = 0;
  for (int i = 0; i < tensor.ndim; ++i) {
    if (tensor.size[i] == 0) return 0;
    last += (tensor.size[i] - 1) * tensor.stride[i];
  }
  const int64_t element = tensor.dtype == DType::kFloat64 ? 8 : tensor.dtype == DType::kFloat32 ? 4 : 2;
  return (last + 1) * element;
}

bool is_dense(const Tensor& tensor) {
  int64_t expected = 1;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    if (tensor.size[i] == 0) return true;
    if (tensor.size[i] != 1 && tensor.stride[i] != expected) return false;
    expected *= tensor.size[i];
  }
  return true;
}

namespace {

// The dtypes as torch calls them, in DType's order: Python sends a tensor's dtype as its place here.
py::tuple dtype_names() {
  static_assert(static_cast<int>(DType::kInt64) == 7, "a name for each DType");
  return py::make_tuple("float32", "float64", "bfloat16", "float16", "uint8", "int16", "int32", "int64");
}

std::vector<std::string> runnable_isas() {
  std::vector<std::string> names;
  for (int i = 0; i <= static_cast<int>(best_isa()); ++i) names.push_back(name_of(static_cast<Isa>(i)));
  return names;
}

}  // namespace
}  // namespace python
}  // namespace fastseg

PYBIND11_MODULE(_C, m) {
  m.doc() = "The C++ kernels of fastseg. Private: fastseg.functional is the API.";
  m.def("active_isa", [] { return std::string(fastseg::name_of(fastseg::active_isa())); });
  m.def("runnable_isas", [] {
    fastseg::python::py::list names;
    for (const std::string& name : fastseg::python::runnable_isas()) names.append(name);
    return names;
  });
  m.def("select_isa", [](const std::string& name) { fastseg::select_isa(name.c_str()); });
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
  m.attr("DTYPES") = fastseg::python::dtype_names();
  m.attr("MAX_DIMS") = fastseg::kMaxDims;
  fastseg::python::bind_conv_relu_pool2d(m);
  fastseg::python::bind_instance_norm(m);
  fastseg::python::bind_losses_and_predictions(m);
}

// What the bindings of all operators share: tensors as Python describes them, and the checks of their shapes.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>

#include "core/tensor.h"

namespace fastseg {
namespace python {

namespace py = pybind11;

// Throws std::invalid_argument, in Python a ValueError.
void require(bool condition, const char* what);

// From (address, dtype, sizes, strides), which it checks; None is a tensor without memory.
Tensor from_python(const py::object& description);

// The tensors of a call, in the order in which its binding names them.
void read_tensors(const py::tuple& descriptions, std::initializer_list<Tensor*> tensors);

bool is_floating(const Tensor& tensor);
bool same_shape(const Tensor& a, const Tensor& b);
bool is_dense(const Tensor& tensor);
bool is_tensor(const Tensor& tensor, DType dtype, std::initializer_list<int64_t> sizes);

// From a floating-point tensor's first element to its last, in bytes.
int64_t byte_span(const Tensor& tensor);

// One function for each family's file.
void bind_conv_relu_pool2d(py::module_& m);
void bind_instance_norm(py::module_& m);
void bind_losses_and_predictions(py::module_& m);

}  // namespace python
}  // namespace fastseg

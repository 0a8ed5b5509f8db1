// fastseg._C: what Python calls. Every tensor arrives as (address, dtype, sizes, strides) and is checked here, before a
// kernel sees it; the interpreter lock is released around the kernels.
#include <pybind11/pybind11.h>

#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "conv_relu_pool2d.h"
#include "cross_entropy.h"
#include "isa.h"
#include "parallel.h"
#include "tensor.h"

namespace py = pybind11;

namespace fastseg {
namespace python {  // the functions' names are the kernels' names
namespace {

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

bool is_floating(const Tensor& tensor) {
  return tensor.dtype <= DType::kFloat16;
}

bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.ndim != b.ndim) return false;
  for (int i = 0; i < a.ndim; ++i)
    if (a.size[i] != b.size[i]) return false;
  return true;
}

// From a floating-point tensor's first element to its last, in bytes.
int64_t byte_span(const Tensor& tensor) {
  int64_t last = 0;
  for (int i = 0; i < tensor.ndim; ++i) {
    if (tensor.size[i] == 0) return 0;
    last += (tensor.size[i] - 1) * tensor.stride[i];
  }
  const int64_t element = tensor.dtype == DType::kFloat64 ? 8 : tensor.dtype == DType::kFloat32 ? 4 : 2;
  return (last + 1) * element;
}

// ---- conv_relu_pool2d ----

// In the order of fastseg/ops/conv_relu_pool2d_geometry.py's flatten(); groups and ceil_mode, the last two, are
// Python's.
constexpr size_t kGeometryNumbers = 14;

ConvPoolGeometry read_geometry(const py::sequence& numbers) {
  require(numbers.size() == kGeometryNumbers, "the geometry is 14 numbers");
  ConvPoolGeometry g;
  const struct {
    int64_t* pair;
    int64_t least;
    const char* what;
  } fields[] = {{g.stride, 1, "stride is positive"},           {g.padding, 0, "padding is not negative"},
                {g.dilation, 1, "dilation is positive"},       {g.pool_size, 1, "pool_size is positive"},
                {g.pool_stride, 1, "pool_stride is positive"}, {g.pool_padding, 0, "pool_padding is not negative"}};
  size_t next = 0;
  for (const auto& field : fields) {
    for (int axis = 0; axis < 2; ++axis) {
      field.pair[axis] = numbers[next++].cast<int64_t>();
      require(field.pair[axis] >= field.least, field.what);
    }
  }
  require(g.pool_size[0] * g.pool_size[1] <= kCut, "a pool window has at most 255 positions");
  return g;
}

// Every window has at least one position inside the convolution's output, and the pooled size is not larger than that.
void check_pool(const Tensor& pooled, int64_t height, int64_t width, const ConvPoolGeometry& g) {
  const int64_t size[2] = {height, width};
  for (int i = 0; i < 2; ++i) {
    require(g.pool_padding[i] < g.pool_size[i], "pool_padding is smaller than pool_size");
    require(pooled.size[2 + i] == 0 || (pooled.size[2 + i] - 1) * g.pool_stride[i] - g.pool_padding[i] < size[i],
            "the pooled size does not fit the convolution's output");
  }
}

void check_pooled(const Tensor& pooled, const Tensor& positions) {
  require(pooled.ndim == 4 && is_floating(pooled), "the pooled tensor is a floating-point [N, K, H, W]");
  if (!positions) return;
  require(positions.dtype == DType::kUInt8 && same_shape(positions, pooled),
          "positions are uint8, of the output's shape");
}

void check_convolution(const Tensor& input, const Tensor& weight, const Tensor& pooled, const ConvPoolGeometry& g) {
  require(input.ndim == 4 && weight.ndim == 4 && is_floating(input), "input and weight have four dimensions");
  require(weight.dtype == input.dtype && pooled.dtype == input.dtype, "input, weight and output have one dtype");
  require(weight.size[1] == input.size[1], "weight and input have the same channels (no groups here)");
  require(pooled.size[0] == input.size[0] && pooled.size[1] == weight.size[0], "output is [N, K, ...]");
  int64_t convolved[2];
  for (int i = 0; i < 2; ++i) {
    const int64_t reach = (weight.size[2 + i] - 1) * g.dilation[i] + 1;
    const int64_t room = input.size[2 + i] + 2 * g.padding[i] - reach;
    require(weight.size[2 + i] > 0 && room >= 0, "the kernel is larger than the padded input");
    convolved[i] = room / g.stride[i] + 1;
  }
  check_pool(pooled, convolved[0], convolved[1], g);
}

void conv_relu_pool2d_forward(const py::object& input, const py::object& weight, const py::object& bias,
                              const py::object& output, const py::object& positions, const py::sequence& geometry,
                              int threads) {
  ConvReluPool2dForward call;
  call.input = from_python(input);
  call.weight = from_python(weight);
  call.bias = from_python(bias);
  call.output = from_python(output);
  call.positions = from_python(positions);
  call.geometry = read_geometry(geometry);
  call.threads = threads;
  check_pooled(call.output, call.positions);
  check_convolution(call.input, call.weight, call.output, call.geometry);
  require(!call.bias ||
              (call.bias.ndim == 1 && call.bias.size[0] == call.weight.size[0] && call.bias.dtype == call.input.dtype),
          "bias is [K], of input's dtype");
  py::gil_scoped_release unlocked;
  advise_huge_pages(call.output.data, byte_span(call.output));
  fastseg::conv_relu_pool2d_forward(call);
}

void conv_relu_pool2d_backward(const py::object& grad_output, const py::object& positions, const py::object& input,
                               const py::object& weight, const py::object& grad_input, const py::object& grad_weight,
                               const py::object& grad_bias, const py::sequence& geometry, int threads) {
  ConvReluPool2dBackward call;
  call.grad_output = from_python(grad_output);
  call.positions = from_python(positions);
  call.input = from_python(input);
  call.weight = from_python(weight);
  call.grad_input = from_python(grad_input);
  call.grad_weight = from_python(grad_weight);
  call.grad_bias = from_python(grad_bias);
  call.geometry = read_geometry(geometry);
  call.threads = threads;
  check_pooled(call.grad_output, call.positions);
  check_convolution(call.input, call.weight, call.grad_output, call.geometry);
  const auto like = [&](const Tensor& gradient, const Tensor& tensor) {
    return !gradient || (same_shape(gradient, tensor) && gradient.dtype == call.input.dtype);
  };
  require(like(call.grad_input, call.input) && like(call.grad_weight, call.weight),
          "a gradient has its tensor's shape and dtype");
  require(!call.grad_bias || (call.grad_bias.ndim == 1 && call.grad_bias.size[0] == call.weight.size[0] &&
                              call.grad_bias.dtype == call.input.dtype),
          "grad_bias is [K], of input's dtype");
  py::gil_scoped_release unlocked;
  fastseg::conv_relu_pool2d_backward(call);
}

void relu_pool2d_forward(const py::object& input, const py::object& output, const py::object& positions,
                         const py::sequence& geometry, bool relu_in_place, int threads) {
  ReluPool2dForward call;
  call.input = from_python(input);
  call.output = from_python(output);
  call.positions = from_python(positions);
  call.geometry = read_geometry(geometry);
  call.relu_in_place = relu_in_place;
  call.threads = threads;
  check_pooled(call.output, call.positions);
  require(call.input.ndim == 4 && call.input.dtype == call.output.dtype, "input is [N, K, H, W], of output's dtype");
  require(call.input.size[0] == call.output.size[0] && call.input.size[1] == call.output.size[1],
          "input and output have the same N and K");
  require(!relu_in_place || call.geometry.pool_stride[0] >= call.geometry.pool_size[0],
          "relu_in_place needs windows that don't overlap");
  check_pool(call.output, call.input.size[2], call.input.size[3], call.geometry);
  py::gil_scoped_release unlocked;
  advise_huge_pages(call.output.data, byte_span(call.output));
  fastseg::relu_pool2d_forward(call);
}

void relu_pool2d_backward(const py::object& grad_output, const py::object& positions, const py::object& skip,
                          const py::object& grad_skip, const py::object& grad_input, const py::sequence& geometry,
                          int threads) {
  ReluPool2dBackward call;
  call.grad_output = from_python(grad_output);
  call.positions = from_python(positions);
  call.skip = from_python(skip);
  call.grad_skip = from_python(grad_skip);
  call.grad_input = from_python(grad_input);
  call.geometry = read_geometry(geometry);
  call.threads = threads;
  const Tensor& dense = call.grad_input;
  require(dense.ndim == 4 && is_floating(dense), "grad_input is a floating-point [N, K, H, W]");
  require(bool(call.skip) == bool(call.grad_skip), "skip and grad_skip come together");
  require(bool(call.grad_output) == bool(call.positions), "grad_output and positions come together");
  for (const Tensor* full : {&call.skip, &call.grad_skip})
    require(!*full || (same_shape(*full, dense) && full->dtype == dense.dtype),
            "skip has grad_input's shape and dtype");
  if (call.grad_output) {
    check_pooled(call.grad_output, call.positions);
    require(call.grad_output.dtype == dense.dtype && call.grad_output.size[0] == dense.size[0] &&
                call.grad_output.size[1] == dense.size[1],
            "grad_output has grad_input's N, K and dtype");
    check_pool(call.grad_output, dense.size[2], dense.size[3], call.geometry);
  }
  py::gil_scoped_release unlocked;
  advise_huge_pages(call.grad_input.data, byte_span(call.grad_input));
  fastseg::relu_pool2d_backward(call);
}

// ---- cross_entropy ----

bool is_dense(const Tensor& tensor) {
  int64_t expected = 1;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    if (tensor.size[i] == 0) return true;
    if (tensor.size[i] != 1 && tensor.stride[i] != expected) return false;
    expected *= tensor.size[i];
  }
  return true;
}

// Whether tensor is of shape [leading, then all of input's sizes but the classes'].
bool is_per_pixel(const Tensor& tensor, const Tensor& input, int leading) {
  if (tensor.ndim != input.ndim - 1 + leading) return false;
  for (int i = leading; i < tensor.ndim; ++i)
    if (tensor.size[i] != input.size[i == leading ? 0 : i - leading + 1]) return false;
  return true;
}

void check_cross_entropy(const CrossEntropy& call) {
  const Tensor &input = call.input, &target = call.target;
  require(input.ndim >= 2 && is_floating(input), "input is a floating-point [N, C, d1, ...]");
  require(input.size[1] >= 1 && input.size[1] <= std::numeric_limits<int32_t>::max(),
          "input has 1 to 2^31 - 1 classes");
  const bool wide = input.dtype == DType::kFloat64;
  const DType accumulated = wide ? DType::kFloat64 : DType::kFloat32;
  if (is_floating(target)) {
    require(same_shape(target, input), "class probabilities have input's shape");
    require((target.dtype == DType::kFloat64) == wide,
            "class probabilities are float64 where input is, and only there");
  } else {
    require(is_per_pixel(target, input, 0), "target is [N, d1, ...]");
  }
  require(!call.weight || (call.weight.ndim == 1 && call.weight.size[0] == input.size[1] && is_dense(call.weight) &&
                           call.weight.dtype == accumulated),
          "weight is a dense [C], float64 where input is, else float32");
  require(is_per_pixel(call.statistics, input, 1) && call.statistics.size[0] == 2 && is_dense(call.statistics) &&
              call.statistics.dtype == accumulated,
          "statistics is a dense [2, N, d1, ...], float64 where input is, else float32");
  require(call.total_weight && call.total_weight.ndim == 0 && call.total_weight.dtype == accumulated,
          "total_weight is a number, float64 where input is, else float32");
  require(call.reduction >= Reduction::kNone && call.reduction <= Reduction::kSum, "unknown reduction");
}

// The loss, or its gradient: a value per pixel without a reduction, else one.
void check_loss(const Tensor& loss, const CrossEntropy& call) {
  const bool fits = call.reduction == Reduction::kNone ? is_per_pixel(loss, call.input, 0) : loss && loss.ndim == 0;
  require(fits && loss.dtype == call.total_weight.dtype, "the loss has a value per pixel, or one; statistics' dtype");
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
  check_cross_entropy(call);
  return call;
}

template <class Call>
void run_cross_entropy(Call& call, void (*kernel)(const Call&)) {
  InvalidLabel invalid = {};
  call.invalid = &invalid;
  {
    py::gil_scoped_release unlocked;
    kernel(call);
  }
  if (!invalid.found) return;
  throw py::index_error("target: expected classes in [0, " + std::to_string(call.input.size[1]) +
                        ") or ignore_index (" + std::to_string(call.ignore_index) + "), got " +
                        std::to_string(invalid.value));
}

void cross_entropy_forward(const py::object& input, const py::object& target, const py::object& weight,
                           const py::object& loss, const py::object& statistics, const py::object& total_weight,
                           int64_t ignore_index, int reduction, double label_smoothing, int threads) {
  auto call = read_cross_entropy<CrossEntropyForward>(input, target, weight, statistics, total_weight, ignore_index,
                                                      reduction, label_smoothing, threads);
  call.loss = from_python(loss);
  check_loss(call.loss, call);
  require(is_dense(call.loss), "the loss is dense");
  run_cross_entropy(call, fastseg::cross_entropy_forward);
}

void cross_entropy_backward(const py::object& grad_output, const py::object& input, const py::object& target,
                            const py::object& weight, const py::object& statistics, const py::object& total_weight,
                            const py::object& grad_input, int64_t ignore_index, int reduction, double label_smoothing,
                            int threads) {
  auto call = read_cross_entropy<CrossEntropyBackward>(input, target, weight, statistics, total_weight, ignore_index,
                                                       reduction, label_smoothing, threads);
  call.grad_output = from_python(grad_output);
  call.grad_input = from_python(grad_input);
  check_loss(call.grad_output, call);
  require(same_shape(call.grad_input, call.input) && call.grad_input.dtype == call.input.dtype,
          "grad_input has input's shape and dtype");
  advise_huge_pages(call.grad_input.data, byte_span(call.grad_input));
  run_cross_entropy(call, fastseg::cross_entropy_backward);
}

// ---- instruction sets ----

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
    py::list names;
    for (const std::string& name : fastseg::python::runnable_isas()) names.append(name);
    return names;
  });
  m.def("select_isa", [](const std::string& name) { fastseg::select_isa(name.c_str()); });
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
  m.def("conv_relu_pool2d_forward", &fastseg::python::conv_relu_pool2d_forward);
  m.def("conv_relu_pool2d_backward", &fastseg::python::conv_relu_pool2d_backward);
  m.def("relu_pool2d_forward", &fastseg::python::relu_pool2d_forward);
  m.def("relu_pool2d_backward", &fastseg::python::relu_pool2d_backward);
  m.def("cross_entropy_forward", &fastseg::python::cross_entropy_forward);
  m.def("cross_entropy_backward", &fastseg::python::cross_entropy_backward);
}

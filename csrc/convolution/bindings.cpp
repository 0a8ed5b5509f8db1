// conv_relu_pool2d for Python; conv2d and relu_pool2d, which share its kernels, too.
#include "core/bindings.h"

#include <algorithm>

#include "convolution/conv_relu_pool2d.h"
#include "core/parallel.h"

namespace fastseg {
namespace python {  // the functions' names are the kernels' names
namespace {

// In the order of fastseg/ops/convolution/geometry.py's flatten(); groups and ceil_mode, the last two, are
// Python's.
constexpr size_t kGeometryNumbers = 14;

// A map with more elements than this is no tensor's; up to it, the kernels' products of sizes fit 64 bits.
constexpr double kMostElements = 1e15;

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
      require(field.pair[axis] <= INT32_MAX, "a number of the geometry fits 32 bits");
    }
  }
  require(g.pool_size[0] * g.pool_size[1] <= kCut, "a pool window has at most 255 positions");
  return g;
}

// A stride that leads past the end is never taken: it is as short as a window may be, or as what it goes along.
void check_stride(int64_t stride, int64_t extent) {
  require(stride <= std::max<int64_t>(extent, kCut), "a stride is not longer than what it goes along");
}

// Every window has at least one position inside the convolution's output, and the pooled size is not larger than that.
void check_pool(const Tensor& pooled, int64_t height, int64_t width, const ConvPoolGeometry& g) {
  const int64_t size[2] = {height, width};
  for (int i = 0; i < 2; ++i) {
    require(g.pool_padding[i] < g.pool_size[i], "pool_padding is smaller than pool_size");
    check_stride(g.pool_stride[i], size[i] + g.pool_padding[i]);
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
  double elements = static_cast<double>(input.size[1]);
  for (int i = 0; i < 2; ++i) {
    const int64_t reach = (weight.size[2 + i] - 1) * g.dilation[i] + 1;
    const int64_t room = input.size[2 + i] + 2 * g.padding[i] - reach;
    require(weight.size[2 + i] > 0 && room >= 0, "the kernel is larger than the padded input");
    check_stride(g.stride[i], room + 1);
    convolved[i] = room / g.stride[i] + 1;
    elements *= static_cast<double>(input.size[2 + i] + 2 * g.padding[i]);
  }
  require(elements <= kMostElements, "the padded input is not larger than any tensor");
  check_pool(pooled, convolved[0], convolved[1], g);
}

void read_gradients(const py::object& input, const py::object& weight, const py::object& grad_input,
                    const py::object& grad_weight, const py::object& grad_bias, int threads, ConvGradients* call) {
  call->input = from_python(input);
  call->weight = from_python(weight);
  call->grad_input = from_python(grad_input);
  call->grad_weight = from_python(grad_weight);
  call->grad_bias = from_python(grad_bias);
  call->threads = threads;
  const auto like = [&](const Tensor& gradient, const Tensor& tensor) {
    return !gradient || (same_shape(gradient, tensor) && gradient.dtype == call->input.dtype);
  };
  require(like(call->grad_input, call->input) && like(call->grad_weight, call->weight),
          "a gradient has its tensor's shape and dtype");
  require(!call->grad_bias || (call->grad_bias.ndim == 1 && call->grad_bias.size[0] == call->weight.size[0] &&
                               call->grad_bias.dtype == call->input.dtype),
          "grad_bias is [K], of input's dtype");
}

ConvReluPool2dForward read_forward(const py::object& input, const py::object& weight, const py::object& bias,
                                   const py::object& output, const py::object& positions,
                                   const ConvPoolGeometry& geometry, int threads) {
  ConvReluPool2dForward call;
  call.input = from_python(input);
  call.weight = from_python(weight);
  call.bias = from_python(bias);
  call.output = from_python(output);
  call.positions = from_python(positions);
  call.geometry = geometry;
  call.threads = threads;
  check_pooled(call.output, call.positions);
  check_convolution(call.input, call.weight, call.output, call.geometry);
  require(!call.bias ||
              (call.bias.ndim == 1 && call.bias.size[0] == call.weight.size[0] && call.bias.dtype == call.input.dtype),
          "bias is [K], of input's dtype");
  return call;
}

void conv_relu_pool2d_forward(const py::object& input, const py::object& weight, const py::object& bias,
                              const py::object& output, const py::object& positions, const py::sequence& geometry,
                              int threads) {
  const ConvReluPool2dForward call =
      read_forward(input, weight, bias, output, positions, read_geometry(geometry), threads);
  py::gil_scoped_release unlocked;
  advise_huge_pages(call.output.data, byte_span(call.output));
  fastseg::conv_relu_pool2d_forward(call);
}

bool conv_relu_pool2d_winograd_forward(const py::object& input, const py::object& weight, const py::object& bias,
                                       const py::object& output, const py::object& positions, const py::object& skip,
                                       const py::sequence& geometry, int threads) {
  bool done = false;
  ConvReluPool2dWinogradForward call;
  static_cast<ConvReluPool2dForward&>(call) =
      read_forward(input, weight, bias, output, positions, read_geometry(geometry), threads);
  call.skip = from_python(skip);
  call.done = &done;
  const ConvPoolGeometry& g = call.geometry;
  require(call.weight.size[1] > 0 && call.output.size[2] > 0 && call.output.size[3] > 0,
          "the Winograd kernels are for at least one channel and one window");
  const auto is = [&](int64_t kernel, int64_t stride, int64_t pool, int64_t pool_stride, int64_t pool_padding) {
    bool same = true;
    for (int axis = 0; axis < 2; ++axis)
      same = same && call.weight.size[2 + axis] == kernel && g.stride[axis] == stride && g.dilation[axis] == 1 &&
             g.pool_size[axis] == pool && g.pool_stride[axis] == pool_stride && g.pool_padding[axis] == pool_padding;
    return same;
  };
  require(is(3, 1, 2, 2, 0) || (!call.skip && (is(3, 1, 1, 1, 0) || is(7, 2, 3, 2, 1))),
          "the Winograd kernels are for 3x3 under a 2x2 pool, with or without a skip, for 3x3 without a pool, and for "
          "7x7 of stride 2 under a 3x3 pool of stride 2");
  require(!call.skip || (call.skip.ndim == 4 && call.skip.dtype == call.output.dtype &&
                         call.skip.size[0] == call.output.size[0] && call.skip.size[1] == call.output.size[1] &&
                         call.skip.size[2] == call.input.size[2] + 2 * g.padding[0] - 2 &&
                         call.skip.size[3] == call.input.size[3] + 2 * g.padding[1] - 2),
          "skip is [N, K, convolved height, convolved width], of output's dtype");
  py::gil_scoped_release unlocked;
  advise_huge_pages(call.output.data, byte_span(call.output));
  if (call.skip) advise_huge_pages(call.skip.data, byte_span(call.skip));
  fastseg::conv_relu_pool2d_winograd_forward(call);
  return done;
}

void read_padding(const py::sequence& numbers, int64_t padding[2]) {
  require(numbers.size() == 2, "padding is two numbers");
  for (size_t i = 0; i < 2; ++i) {
    padding[i] = numbers[i].cast<int64_t>();
    require(padding[i] >= 0, "padding is not negative");
  }
}

bool conv2d_winograd_forward(const py::object& input, const py::object& weight, const py::object& bias,
                             const py::object& output, const py::sequence& padding, int threads) {
  bool done = false;
  ConvReluPool2dWinogradForward call;
  ConvPoolGeometry g = {{1, 1}, {}, {1, 1}, {1, 1}, {1, 1}, {}};
  read_padding(padding, g.padding);
  static_cast<ConvReluPool2dForward&>(call) = read_forward(input, weight, bias, output, py::none(), g, threads);
  call.relu = false;
  call.done = &done;
  const Tensor &x = call.input, &w = call.weight, &y = call.output;
  require(w.size[0] > 0 && w.size[1] > 0, "the Winograd kernels are for at least one channel");
  for (int i = 0; i < 2; ++i)
    require(w.size[2 + i] == 3 && y.size[2 + i] == x.size[2 + i] + 2 * g.padding[i] - 2,
            "the Winograd kernels are for 3x3, and output has the convolution's size");
  py::gil_scoped_release unlocked;
  advise_huge_pages(y.data, byte_span(y));
  fastseg::conv_relu_pool2d_winograd_forward(call);
  return done;
}

bool conv2d_winograd_backward(const py::object& grad_output, const py::object& input, const py::object& weight,
                              const py::object& grad_input, const py::object& grad_weight, const py::object& grad_bias,
                              const py::sequence& padding, int threads) {
  bool done = false;
  Conv2dWinogradBackward call;
  read_gradients(input, weight, grad_input, grad_weight, grad_bias, threads, &call);
  read_padding(padding, call.padding);
  call.grad_output = from_python(grad_output);
  call.done = &done;
  const Tensor &dense = call.grad_output, &x = call.input, &w = call.weight;
  require(x.ndim == 4 && w.ndim == 4 && dense.ndim == 4 && is_floating(x), "all tensors have four dimensions");
  require(w.dtype == x.dtype && dense.dtype == x.dtype, "input, weight and gradient have one dtype");
  require(w.size[1] == x.size[1] && w.size[0] == dense.size[1] && x.size[0] == dense.size[0],
          "input is [N, C, ...], weight [K, C, 3, 3], the gradient [N, K, ...]");
  require(w.size[0] > 0 && w.size[1] > 0, "the Winograd kernels are for at least one channel");
  for (int i = 0; i < 2; ++i) {
    require(w.size[2 + i] == 3 && call.padding[i] <= 2,
            "the Winograd kernels' gradients are for 3x3 with a padding of at most 2");
    require(dense.size[2 + i] > 0 && dense.size[2 + i] == x.size[2 + i] + 2 * call.padding[i] - 2,
            "the gradient has the convolution's size");
  }
  py::gil_scoped_release unlocked;
  if (call.grad_input) advise_huge_pages(call.grad_input.data, byte_span(call.grad_input));
  fastseg::conv2d_winograd_backward(call);
  return done;
}

void conv_relu_pool2d_backward(const py::object& grad_output, const py::object& positions, const py::object& input,
                               const py::object& weight, const py::object& grad_input, const py::object& grad_weight,
                               const py::object& grad_bias, const py::sequence& geometry, int threads) {
  ConvReluPool2dBackward call;
  read_gradients(input, weight, grad_input, grad_weight, grad_bias, threads, &call);
  call.grad_output = from_python(grad_output);
  call.positions = from_python(positions);
  call.geometry = read_geometry(geometry);
  check_pooled(call.grad_output, call.positions);
  check_convolution(call.input, call.weight, call.grad_output, call.geometry);
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

}  // namespace

void bind_conv_relu_pool2d(py::module_& m) {
  m.def("conv_relu_pool2d_forward", &conv_relu_pool2d_forward);
  m.def("conv_relu_pool2d_winograd_forward", &conv_relu_pool2d_winograd_forward);
  m.def("conv2d_winograd_forward", &conv2d_winograd_forward);
  m.def("conv2d_winograd_backward", &conv2d_winograd_backward);
  m.def("conv_relu_pool2d_backward", &conv_relu_pool2d_backward);
  m.def("relu_pool2d_forward", &relu_pool2d_forward);
  m.def("relu_pool2d_backward", &relu_pool2d_backward);
}

}  // namespace python
}  // namespace fastseg

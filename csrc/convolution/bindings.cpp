// The convolutions for Python. A call's tensors come in one tuple, in the order in which the binding reads them, and
// its geometry in one row of numbers: names for them would cost a call 1 to 2 us (2 cores, AMD Zen 3, 2026-11-26).
#include "core/bindings.h"

#include <algorithm>
#include <initializer_list>
#include <iterator>
#include <stdexcept>
#include <string>

#include "convolution/conv_relu_pool2d.h"
#include "core/parallel.h"

namespace fastseg {
namespace python {  // the functions' names are the kernels' names
namespace {

// A map with more elements than this is no tensor's; up to it, the kernels' products of sizes fit 64 bits.
constexpr double kMostElements = 1e15;

// The pairs that a geometry's numbers begin with; what follows is Python's.
constexpr struct {
  const char* name;
  int64_t (ConvPoolGeometry::*pair)[2];
  int64_t least;
} kPairs[] = {{"stride", &ConvPoolGeometry::stride, 1},           {"padding", &ConvPoolGeometry::padding, 0},
              {"dilation", &ConvPoolGeometry::dilation, 1},       {"pool_size", &ConvPoolGeometry::pool_size, 1},
              {"pool_stride", &ConvPoolGeometry::pool_stride, 1}, {"pool_padding", &ConvPoolGeometry::pool_padding, 0}};

ConvPoolGeometry read_geometry(const py::sequence& numbers) {
  require(numbers.size() >= 2 * std::size(kPairs), "the geometry has too few numbers");
  ConvPoolGeometry g;
  size_t next = 0;
  for (const auto& [name, pair, least] : kPairs) {
    for (int64_t& number : g.*pair) {
      number = numbers[next++].cast<int64_t>();
      if (number < least || number > INT32_MAX) throw std::invalid_argument(std::string(name) + " is out of range");
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

int64_t convolved_size(const Tensor& input, const Tensor& weight, const ConvPoolGeometry& g, int axis) {
  const int64_t reach = (weight.size[2 + axis] - 1) * g.dilation[axis] + 1;
  const int64_t room = input.size[2 + axis] + 2 * g.padding[axis] - reach;
  require(weight.size[2 + axis] > 0 && room >= 0, "the kernel is larger than the padded input");
  check_stride(g.stride[axis], room + 1);
  return room / g.stride[axis] + 1;
}

void check_convolution(const Tensor& input, const Tensor& weight, const Tensor& pooled, const ConvPoolGeometry& g) {
  require(input.ndim == 4 && weight.ndim == 4 && is_floating(input), "input and weight have four dimensions");
  require(weight.dtype == input.dtype && pooled.dtype == input.dtype, "input, weight and output have one dtype");
  require(weight.size[1] == input.size[1], "weight and input have the same channels (no groups here)");
  require(pooled.size[0] == input.size[0] && pooled.size[1] == weight.size[0], "output is [N, K, ...]");
  double elements = static_cast<double>(input.size[1]);
  for (int i = 0; i < 2; ++i) elements *= static_cast<double>(input.size[2 + i] + 2 * g.padding[i]);
  require(elements <= kMostElements, "the padded input is not larger than any tensor");
  check_pool(pooled, convolved_size(input, weight, g, 0), convolved_size(input, weight, g, 1), g);
}

void check_forward(const ConvReluPool2dForward& call) {
  check_pooled(call.output, call.positions);
  check_convolution(call.input, call.weight, call.output, call.geometry);
  require(!call.bias ||
              (call.bias.ndim == 1 && call.bias.size[0] == call.weight.size[0] && call.bias.dtype == call.input.dtype),
          "bias is [K], of input's dtype");
}

void check_gradients(const ConvGradients& call) {
  const auto like = [&](const Tensor& gradient, const Tensor& tensor) {
    return !gradient || (same_shape(gradient, tensor) && gradient.dtype == call.input.dtype);
  };
  require(like(call.grad_input, call.input) && like(call.grad_weight, call.weight),
          "a gradient has its tensor's shape and dtype");
  require(!call.grad_bias || (call.grad_bias.ndim == 1 && call.grad_bias.size[0] == call.weight.size[0] &&
                              call.grad_bias.dtype == call.input.dtype),
          "grad_bias is [K], of input's dtype");
}

// Whether kernel, stride and dilation are alike along both axes, with a dilation of 1.
bool convolves(const Tensor& weight, const ConvPoolGeometry& g, int64_t kernel, int64_t stride) {
  bool same = true;
  for (int i = 0; i < 2; ++i)
    same = same && weight.size[2 + i] == kernel && g.stride[i] == stride && g.dilation[i] == 1;
  return same;
}

// Whether there is a dilation, and each tap of an output sees pixels that lie a whole number of dilations apart from
// it.
bool dilates_in_phases(const ConvPoolGeometry& g) {
  bool any = false, whole = true;
  for (int i = 0; i < 2; ++i) {
    any = any || g.dilation[i] > 1;
    whole = whole && g.padding[i] % g.dilation[i] == 0;
  }
  return any && whole;
}

bool pools(const ConvPoolGeometry& g, int64_t size, int64_t stride, int64_t padding) {
  bool same = true;
  for (int i = 0; i < 2; ++i)
    same = same && g.pool_size[i] == size && g.pool_stride[i] == stride && g.pool_padding[i] == padding;
  return same;
}

void conv_relu_pool2d_forward(const py::tuple& tensors, const py::sequence& geometry, int threads) {
  ConvReluPool2dForward call;
  read_tensors(tensors, {&call.input, &call.weight, &call.bias, &call.output, &call.positions});
  call.geometry = read_geometry(geometry);
  call.threads = threads;
  check_forward(call);
  py::gil_scoped_release unlocked;
  advise_huge_pages(call.output.data, byte_span(call.output));
  fastseg::conv_relu_pool2d_forward(call);
}

// Weights of which something is kept are read as they lie in memory, to see whether they have changed.
void check_read_as_they_lie(const Tensor& weight, const Tensor& bias, const Tensor& scale) {
  require(weight.ndim == 4, "weight has four dimensions");
  Tensor nhwc = weight;
  for (int axis = 1; axis < 4; ++axis)
    nhwc.size[axis] = weight.size[axis % 3 + 1], nhwc.stride[axis] = weight.stride[axis % 3 + 1];
  require((is_dense(weight) || is_dense(nhwc)) && is_dense(bias) && is_dense(scale), "weights that are kept are dense");
}

void check_scale(const Tensor& weight, const Tensor& scale) {
  require(!scale || (scale.ndim == 1 && scale.size[0] == weight.size[0] && scale.dtype == weight.dtype),
          "scale is [K], of weight's dtype");
}

void check_kept(const ConvReluPool2dWinogradForward& call) {
  check_scale(call.weight, call.scale);
  if (!call.kept) return;
  require(call.kept.ndim == 1 && call.kept.dtype == DType::kUInt8 && is_dense(call.kept), "kept is uint8 [bytes]");
  check_read_as_they_lie(call.weight, call.bias, call.scale);
}

uint64_t weights_fingerprint(const py::tuple& tensors, uint64_t stamp, int threads) {
  uint64_t fingerprint = 0;
  Conv2dWeightsFingerprint call;
  read_tensors(tensors, {&call.weight, &call.scale});
  call.stamp = stamp;
  call.threads = threads;
  call.fingerprint = &fingerprint;
  check_scale(call.weight, call.scale);
  check_read_as_they_lie(call.weight, {}, call.scale);
  py::gil_scoped_release unlocked;
  fastseg::conv2d_weights_fingerprint(call);
  return fingerprint;
}

int64_t winograd_kept_bytes(const py::object& weight) {
  int64_t bytes = 0;
  fastseg::conv2d_winograd_kept_bytes({from_python(weight), &bytes});
  return bytes;
}

bool winograd_forward(const py::tuple& tensors, const py::sequence& geometry, bool relu, uint64_t stamp, int threads) {
  bool done = false;
  ConvReluPool2dWinogradForward call;
  read_tensors(tensors, {&call.input, &call.weight, &call.bias, &call.output, &call.positions, &call.skip, &call.scale,
                         &call.kept});
  call.geometry = read_geometry(geometry);
  call.relu = relu;
  call.stamp = stamp;
  call.threads = threads;
  call.done = &done;
  check_forward(call);
  check_kept(call);
  const ConvPoolGeometry& g = call.geometry;
  require(call.weight.size[1] > 0 && call.output.size[2] > 0 && call.output.size[3] > 0,
          "the Winograd kernels are for at least one channel and one window");
  const bool dilated = dilates_in_phases(g);
  ConvPoolGeometry undilated = g;
  if (dilated) undilated.dilation[0] = undilated.dilation[1] = 1;
  const bool plain = convolves(call.weight, undilated, 3, 1), unpooled = plain && pools(g, 1, 1, 0);
  const bool stem = convolves(call.weight, g, 7, 2) && pools(g, 3, 2, 1);
  require(unpooled || (relu && ((plain && !dilated && pools(g, 2, 2, 0)) || stem)),
          "the Winograd kernels are for 3x3 under a 2x2 pool or none (without ReLU, or with a dilation, under none), "
          "and for 7x7 of stride 2 under a 3x3 pool of stride 2");
  require(!dilated || call.weight.size[1] > kFewChannels, "dilated 3x3 are for more than four channels");
  require(!call.scale || (plain && call.weight.size[1] > kFewChannels), "scale is for 3x3 and more than four channels");
  require(!call.skip || (plain && !unpooled), "the Winograd kernels are for a skip beside a 2x2 pool alone");
  const Tensor& full = unpooled ? call.output : call.skip;
  require(
      !full || (full.ndim == 4 && full.dtype == call.output.dtype && full.size[0] == call.output.size[0] &&
                full.size[1] == call.output.size[1] && full.size[2] == convolved_size(call.input, call.weight, g, 0) &&
                full.size[3] == convolved_size(call.input, call.weight, g, 1)),
      "what isn't pooled is [N, K, convolved height, convolved width], of output's dtype");
  py::gil_scoped_release unlocked;
  advise_huge_pages(call.output.data, byte_span(call.output));
  if (call.skip) advise_huge_pages(call.skip.data, byte_span(call.skip));
  fastseg::conv_relu_pool2d_winograd_forward(call);
  return done;
}

bool winograd_backward(const py::tuple& tensors, const py::sequence& geometry, int threads) {
  bool done = false;
  Conv2dWinogradBackward call;
  read_tensors(tensors, {&call.grad_output, &call.passed, &call.input, &call.weight, &call.grad_input,
                         &call.grad_weight, &call.grad_bias});
  const ConvPoolGeometry g = read_geometry(geometry);
  std::copy_n(g.padding, 2, call.padding);
  call.threads = threads;
  call.done = &done;
  check_gradients(call);
  const Tensor &dense = call.grad_output, &x = call.input, &w = call.weight;
  require(x.ndim == 4 && w.ndim == 4 && dense.ndim == 4 && is_floating(x), "all tensors have four dimensions");
  require(w.dtype == x.dtype && dense.dtype == x.dtype, "input, weight and gradient have one dtype");
  require(!call.passed || (same_shape(call.passed, dense) && call.passed.dtype == dense.dtype),
          "what ReLU passed has the gradient's shape and dtype");
  require(w.size[1] == x.size[1] && w.size[0] == dense.size[1] && x.size[0] == dense.size[0],
          "input is [N, C, ...], weight [K, C, 3, 3], the gradient [N, K, ...]");
  require(w.size[0] > 0 && w.size[1] > 0, "the Winograd kernels are for at least one channel");
  require(convolves(w, g, 3, 1) && std::max(g.padding[0], g.padding[1]) <= 2,
          "the Winograd kernels' gradients are for 3x3 of stride 1 with a padding of at most 2");
  for (int i = 0; i < 2; ++i)
    require(dense.size[2 + i] == convolved_size(x, w, g, i), "the gradient has the convolution's size");
  py::gil_scoped_release unlocked;
  if (call.grad_input) advise_huge_pages(call.grad_input.data, byte_span(call.grad_input));
  fastseg::conv2d_winograd_backward(call);
  return done;
}

void conv_relu_pool2d_backward(const py::tuple& tensors, const py::sequence& geometry, int threads) {
  ConvReluPool2dBackward call;
  read_tensors(tensors, {&call.grad_output, &call.positions, &call.input, &call.weight, &call.grad_input,
                         &call.grad_weight, &call.grad_bias});
  call.geometry = read_geometry(geometry);
  call.threads = threads;
  check_gradients(call);
  check_pooled(call.grad_output, call.positions);
  check_convolution(call.input, call.weight, call.grad_output, call.geometry);
  py::gil_scoped_release unlocked;
  fastseg::conv_relu_pool2d_backward(call);
}

void relu_pool2d_forward(const py::tuple& tensors, const py::sequence& geometry, bool relu_in_place, int threads) {
  ReluPool2dForward call;
  read_tensors(tensors, {&call.input, &call.output, &call.positions});
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

void relu_pool2d_backward(const py::tuple& tensors, const py::sequence& geometry, int threads) {
  ReluPool2dBackward call;
  read_tensors(tensors, {&call.grad_output, &call.positions, &call.skip, &call.grad_skip, &call.grad_input});
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
  m.def("conv_relu_pool2d_backward", &conv_relu_pool2d_backward);
  m.def("winograd_forward", &winograd_forward);
  m.def("winograd_kept_bytes", &winograd_kept_bytes);
  m.def("weights_fingerprint", &weights_fingerprint);
  m.def("winograd_backward", &winograd_backward);
  m.def("relu_pool2d_forward", &relu_pool2d_forward);
  m.def("relu_pool2d_backward", &relu_pool2d_backward);
  py::tuple names(std::size(kPairs));
  for (size_t i = 0; i < std::size(kPairs); ++i) names[i] = kPairs[i].name;
  m.attr("GEOMETRY") = names;
  m.attr("FEW_CHANNELS") = kFewChannels;
  m.attr("DIRECT_COLUMNS") = kDirectColumns;
}

}  // namespace python
}  // namespace fastseg

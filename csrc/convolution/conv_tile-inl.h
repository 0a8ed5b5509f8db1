// What the forward and the backward kernels of conv_relu_pool2d share: sizes, and a band of the input packed for
// reading.
#pragma once

#include "convolution/conv_relu_pool2d.h"
#include "core/integers.h"
#include "simd/pack-inl.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

// A half-open range of rows or columns.
struct Span {
  int64_t begin, end;
  int64_t size() const { return max_of(end - begin, 0); }
};

// The convolution's rows (axis 0) or columns (axis 1) in pooling window `index`, clipped to those that exist.
inline Span window_span(const ConvPoolGeometry& g, int axis, int64_t index, int64_t convolved) {
  const int64_t begin = index * g.pool_stride[axis] - g.pool_padding[axis];
  return {max_of(begin, 0), min_of(begin + g.pool_size[axis], convolved)};
}

// The pooling windows that hold any of the convolution's rows (or columns) in `span`.
inline Span windows_of(const ConvPoolGeometry& g, int axis, Span span, int64_t pooled) {
  const int64_t last = span.end - 1 + g.pool_padding[axis];
  const int64_t past = span.begin + g.pool_padding[axis] - g.pool_size[axis];  // the last row that no window reaches
  return {past < 0 ? 0 : past / g.pool_stride[axis] + 1, min_of(last / g.pool_stride[axis] + 1, pooled)};
}

struct ConvShape {
  int64_t n, c, h, w;                // input
  int64_t k, kernel_h, kernel_w;     // weight
  int64_t convolved_h, convolved_w;  // the convolution's output, never in memory as a whole
  int64_t pooled_h, pooled_w;        // output

  // Taps are counted in the order (kernel row, kernel column, channel), in which a packed input's patch lies in memory.
  int64_t taps() const { return c * kernel_h * kernel_w; }

  ConvShape(const Tensor& input, const Tensor& weight, const Tensor& output, const ConvPoolGeometry& g)
      : n(input.size[0]),
        c(input.size[1]),
        h(input.size[2]),
        w(input.size[3]),
        k(weight.size[0]),
        kernel_h(weight.size[2]),
        kernel_w(weight.size[3]),
        convolved_h((h + 2 * g.padding[0] - g.dilation[0] * (kernel_h - 1) - 1) / g.stride[0] + 1),
        convolved_w((w + 2 * g.padding[1] - g.dilation[1] * (kernel_w - 1) - 1) / g.stride[1] + 1),
        pooled_h(output.size[2]),
        pooled_w(output.size[3]) {}
};

// The rows of the input that the convolution's rows `convolved` read; negative and past the end: padding.
inline Span input_rows(const ConvShape& shape, const ConvPoolGeometry& g, Span convolved) {
  return {convolved.begin * g.stride[0] - g.padding[0],
          (convolved.end - 1) * g.stride[0] - g.padding[0] + (shape.kernel_h - 1) * g.dilation[0] + 1};
}

// Columns of a packed row whose convolution gives `convolved_w` columns.
inline int64_t packed_width(const ConvShape& shape, const ConvPoolGeometry& g, int64_t convolved_w) {
  return (convolved_w - 1) * g.stride[1] + (shape.kernel_w - 1) * g.dilation[1] + 1;
}

// Packs the input's rows as [rows][width][c] of T, with the padding's zeros written out, so that the loops over it know
// neither borders nor memory formats nor half types.
template <class T>
void pack_input(const Tensor& input, int64_t left_padding, int64_t image, Span rows, int64_t width, T* target) {
  const int64_t channels = input.size[1], pitch = width * channels;
  const int64_t left = min_of(left_padding, width), inside = max_of(min_of(input.size[3], width - left), 0);
  for (int64_t row = rows.begin; row < rows.end; ++row, target += pitch) {
    const bool exists = row >= 0 && row < input.size[2];
    memset(target, 0, static_cast<size_t>((exists ? left : width) * channels) * sizeof(T));
    if (!exists) continue;
    pack(at(input, image * input.stride[0] + row * input.stride[2]), input.dtype, inside, channels, input.stride[3],
         input.stride[1], target + left * channels, channels);
    memset(target + (left + inside) * channels, 0, static_cast<size_t>((width - left - inside) * channels) * sizeof(T));
  }
}

template <class T>
const T* row_of(const Tensor& tensor, int64_t image, int64_t row) {
  return static_cast<const T*>(at(tensor, image * tensor.stride[0] + row * tensor.stride[2]));
}

// target = where passed > 0 (or NaN): value, else 0
template <class T>
void relu_mask(const T* passed, const T* value, int64_t elements, T* target) {
  int64_t i = 0;
  for (; i + kLanes<T> <= elements; i += kLanes<T>)
    store<T>(target + i, load(passed + i) <= Vec<T>{} ? Vec<T>{} : load(value + i));
  for (; i < elements; ++i) target[i] = passed[i] <= 0 ? 0 : value[i];
}

// Packs a gradient as pack_input() does, of which counts what a ReLU let pass: `passed`, optional, is the ReLU's
// output. `buffer` holds a packed row.
template <class T>
void pack_passed(const Tensor& gradient, const Tensor& passed, int64_t left_padding, int64_t image, Span rows,
                 int64_t width, T* buffer, T* target) {
  if (!passed) return pack_input(gradient, left_padding, image, rows, width, target);
  const int64_t channels = gradient.size[1], columns = gradient.size[3], pitch = width * channels;
  const auto lies = [](const Tensor& tensor, int64_t of_channel, int64_t of_column) {
    return tensor.dtype == kDType<T> && tensor.stride[1] == of_channel && tensor.stride[3] == of_column;
  };
  const auto lie = [&](int64_t of_channel, int64_t of_column) {
    return lies(gradient, of_channel, of_column) && lies(passed, of_channel, of_column);
  };
  const bool pixels = lie(1, channels), planes = !pixels && lie(gradient.stride[1], 1);
  Tensor masked = gradient;  // a row, which keeps the order of its elements: it is packed but once
  masked.data = buffer, masked.size[2] = 1;
  if (planes) masked.stride[1] = columns;
  for (int64_t row = rows.begin; row < rows.end; ++row, target += pitch) {
    const bool exists = row >= 0 && row < gradient.size[2];
    if (exists && (pixels || planes)) {
      const T *value = row_of<T>(gradient, image, row), *positive = row_of<T>(passed, image, row);
      for (int64_t c = 0; c < (pixels ? 1 : channels); ++c)
        relu_mask(positive + c * passed.stride[1], value + c * gradient.stride[1], columns * (pixels ? channels : 1),
                  buffer + c * columns);
      pack_input(masked, left_padding, 0, {0, 1}, width, target);
      continue;
    }
    pack_input(gradient, left_padding, image, {row, row + 1}, width, target);
    if (!exists) continue;
    pack_input(passed, left_padding, image, {row, row + 1}, width, buffer);
    relu_mask(buffer, target, pitch, target);
  }
}

// Packs one output channel's kernel in the order of the taps, `step` elements apart.
template <class T>
void pack_kernel(const Tensor& weight, const ConvShape& shape, int64_t channel, T* target, int64_t step) {
  for (int64_t row = 0; row < shape.kernel_h; ++row)
    for (int64_t column = 0; column < shape.kernel_w; ++column)
      for (int64_t c = 0; c < shape.c; ++c, target += step)
        pack(at(weight,
                channel * weight.stride[0] + c * weight.stride[1] + row * weight.stride[2] + column * weight.stride[3]),
             weight.dtype, 1, 1, 1, 1, target, 1);
}

}  // namespace
}  // namespace FASTSEG_ISA
}  // namespace fastseg

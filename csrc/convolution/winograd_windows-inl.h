// conv_relu_pool2d, forward, by Winograd's algorithm for few input channels (a network's first layer). Vectors run
// along a row's windows: the transforms need no wide channels, sixteen products and the window made of them stay in
// registers, and contiguous outputs are written without a transposition.
#pragma once

#include "convolution/conv_relu_pool2d.h"
#include "convolution/conv_tile-inl.h"
#include "convolution/winograd-inl.h"
#include "core/cache.h"
#include "core/parallel.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

template <class T>
struct WinogradWindows {
  static constexpr int kVectors = 2;  // of windows at a time: each weight that is broadcast serves both
  static constexpr int kStep = kVectors * kLanes<T>;
  static constexpr int64_t kLargestBand = 16, kSmallestBand = 4;  // pooled rows; two neighbours share rows of input

  const ConvReluPool2dForward& call;
  const ConvShape shape;
  const int64_t width;   // windows of a row, rounded up to whole steps
  const int64_t plane;   // every second pixel of a packed row
  const int64_t band;    // pooled rows to a task
  const int64_t bands;   // of an image
  T* weights = nullptr;  // [k][product column][product row][c]
  T* bias = nullptr;     // [k]
  T largest_input = 0;   // up to which nothing overflows
  bool* safe = nullptr;  // shared by all tasks

  explicit WinogradWindows(const ConvReluPool2dForward& c)
      : call(c),
        shape(c.input, c.weight, c.output, c.geometry),
        width(round_up(shape.pooled_w, kStep)),
        plane(width + kLanes<T>),
        band(choose_band()),
        bands(ceil_div(shape.pooled_h, band)) {}

  int64_t choose_band() const {
    const int64_t fitting = kWinogradWindowsBandBytes / (2 * plane * shape.c * int64_t{sizeof(T)});
    const int64_t shared = ceil_div(shape.n * shape.pooled_h, max_of(kTasksWanted, int64_t{call.threads}));
    const int64_t most = min_of(min_of(max_of(shared, kSmallestBand), kLargestBand), shape.pooled_h);
    return min_of(max_of((fitting - (kSide - kPoolSide)) / kPoolSide, 1), most);
  }

  int64_t tasks() const { return shape.k == 0 ? 0 : shape.n * bands; }

  int64_t kernel_elements() const { return kProducts * shape.c; }

  int64_t workspace_elements() const {
    return shape.k * kernel_elements() + round_up(shape.k, kLanes<T>) +
           round_up(shape.k * shape.c * kKernelTaps, kLanes<T>) + 2;
  }

  void prepare(void* workspace) {
    weights = static_cast<T*>(workspace);
    bias = weights + shape.k * kernel_elements();
    const int64_t bias_elements = round_up(shape.k, kLanes<T>), taps = kKernelTaps * shape.c;
    const int64_t tap_elements = round_up(shape.k * taps, kLanes<T>);
    T* plain = bias + bias_elements;  // [k][kernel row][kernel column][c]
    T* maxima = plain + tap_elements;
    memset(bias, 0, static_cast<size_t>(bias_elements + tap_elements) * sizeof(T));
    if (call.bias) pack(call.bias.data, call.bias.dtype, 1, shape.k, 0, call.bias.stride[0], bias, 0);
    for (int64_t k = 0; k < shape.k; ++k) {
      pack_kernel(call.weight, shape, k, plain + k * taps, 1);
      for (int64_t c = 0; c < shape.c; ++c) {
        T g[kKernelTaps], u[kSide][kSide];
        for (int tap = 0; tap < kKernelTaps; ++tap) g[tap] = plain[k * taps + tap * shape.c + c];
        transform_kernel(g, u);
        for (int product = 0; product < kProducts; ++product)
          weights[k * kernel_elements() + product * shape.c + c] = u[product % kSide][product / kSide];
      }
    }
    maxima[0] = largest_magnitude(plain, tap_elements);
    maxima[1] = largest_magnitude(bias, bias_elements);
    largest_input = largest_safe_input(maxima, 2, kGrowth * shape.c);
  }

  // Packs the input's rows as [rows][c][parity of the column][plane], with the padding's zeros written out.
  void pack_planes(int64_t image, Span rows, T* row_buffer, T* target) const {
    const Tensor& input = call.input;
    const int64_t left = call.geometry.padding[1], pitch = 2 * plane;
    const int64_t inside = max_of(min_of(shape.w, pitch - left), 0), pixels = shape.c * pitch;
    for (int64_t row = rows.begin; row < rows.end; ++row, target += pixels) {
      if (row < 0 || row >= shape.h) {
        memset(target, 0, static_cast<size_t>(pixels) * sizeof(T));
        continue;
      }
      memset(row_buffer, 0, static_cast<size_t>(pixels) * sizeof(T));
      pack(at(input, image * input.stride[0] + row * input.stride[2]), input.dtype, shape.c, inside, input.stride[1],
           input.stride[3], row_buffer + min_of(left, pitch), pitch);
      for (int64_t c = 0; c < shape.c; ++c) {
        const T* source = row_buffer + c * pitch;
        T *even = target + c * pitch, *odd = even + plane;
        for (int64_t i = 0; i < plane; ++i) even[i] = source[2 * i], odd[i] = source[2 * i + 1];
      }
    }
  }

  // Transforms the patches of kStep windows: [product column][product row][c][kStep]. `input`: the patches' first row.
  void transform_patches(const T* input, int64_t window, T* target) const {
    const int64_t pitch = 2 * plane, row_pitch = shape.c * pitch;
    for (int64_t c = 0; c < shape.c; ++c) {
      for (int64_t lane = 0; lane < kStep; lane += kLanes<T>) {
        const T* even = input + c * pitch + window + lane;
        Vec<T> d[kSide][kSide];
#pragma GCC unroll 4
        for (int y = 0; y < kSide; ++y)
#pragma GCC unroll 4
          for (int x = 0; x < kSide; ++x) d[y][x] = load(even + y * row_pitch + x % 2 * plane + x / 2);
        transform_patch(d);
#pragma GCC unroll 4
        for (int y = 0; y < kSide; ++y)
#pragma GCC unroll 4
          for (int x = 0; x < kSide; ++x) store<T>(target + ((x * kSide + y) * shape.c + c) * kStep + lane, d[y][x]);
      }
    }
  }

  // One column of the products of kStep windows, added to them.
  template <int Channels, int Column>
  FASTSEG_INLINE void add_column(const T* kernel, const T* patches, Window<Vec<T>> (&windows)[kVectors]) const {
    Vec<T> m[kVectors][kSide];
#pragma GCC unroll 4
    for (int y = 0; y < kSide; ++y) {
      const int64_t first = (Column * kSide + y) * Channels;
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v)
        m[v][y] = broadcast(kernel[first]) * load(patches + first * kStep + v * kLanes<T>);
#pragma GCC unroll 4
      for (int64_t i = first + 1; i < first + Channels; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) m[v][y] += broadcast(kernel[i]) * load(patches + i * kStep + v * kLanes<T>);
    }
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) windows[v].template add<Column>(m[v]);
  }

  // kStep windows of all output channels; values, positions: [k][width].
  template <int Channels>
  FASTSEG_NOINLINE void convolve(const T* patches, const Clip<T> (&clips)[kVectors], T* values,
                                 Int<T>* positions) const {
    for (int64_t k = 0; k < shape.k; ++k, values += width, positions += width) {
      const T* kernel = weights + k * kernel_elements();
      Window<Vec<T>> windows[kVectors];
      add_column<Channels, 0>(kernel, patches, windows);
      add_column<Channels, 1>(kernel, patches, windows);
      add_column<Channels, 2>(kernel, patches, windows);
      add_column<Channels, 3>(kernel, patches, windows);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v)
        pool_window(windows[v], broadcast(bias[k]), clips[v], values + v * kLanes<T>, positions + v * kLanes<T>);
    }
  }

  Clip<T> clip_of(int64_t row, int64_t window) const {
    Clip<T> clip = {false, kPoolSide * (row + 1) > shape.convolved_h, {}};
    for (int lane = 0; lane < kLanes<T>; ++lane)
      clip.column[lane] = -Int<T>{kPoolSide * (window + lane + 1) > shape.convolved_w};
    clip.any = clip.row || kPoolSide * (window + kLanes<T>) > shape.convolved_w;
    return clip;
  }

  bool run(int64_t task) const {
    const int64_t image = task / bands, top = task % bands * band, bottom = min_of(top + band, shape.pooled_h);
    const Span rows = {kPoolSide * top - call.geometry.padding[0],
                       kPoolSide * (bottom - 1) - call.geometry.padding[0] + kSide};
    const int64_t row_elements = shape.c * 2 * plane, input_elements = rows.size() * row_elements;
    const int64_t patch_elements = kernel_elements() * kStep, pooled_elements = shape.k * width;
    const int64_t elements = row_elements + input_elements + patch_elements + 2 * pooled_elements;
    T* row_buffer = static_cast<T*>(scratch(elements * int64_t{sizeof(T)}));
    if (row_buffer == nullptr) return false;
    T* input = row_buffer + row_elements;
    T* patches = input + input_elements;
    T* values = patches + patch_elements;
    Int<T>* positions = reinterpret_cast<Int<T>*>(values + pooled_elements);

    constexpr void (WinogradWindows::* kConvolve[kFewChannels])(const T*, const Clip<T>(&)[kVectors], T*, Int<T>*)
        const = {&WinogradWindows::convolve<1>, &WinogradWindows::convolve<2>, &WinogradWindows::convolve<3>,
                 &WinogradWindows::convolve<4>};
    const auto convolve_channels = kConvolve[shape.c - 1];
    pack_planes(image, rows, row_buffer, input);
    if (!may_go_on(largest_magnitude(input, input_elements) <= largest_input, safe)) return true;
    for (int64_t row = top; row < bottom; ++row) {
      for (int64_t window = 0; window < width; window += kStep) {
        transform_patches(input + kPoolSide * (row - top) * row_elements, window, patches);
        const Clip<T> clips[kVectors] = {clip_of(row, window), clip_of(row, window + kLanes<T>)};
        (this->*convolve_channels)(patches, clips, values + window, positions + window);
      }
      write(values, positions, image, row);
    }
    return true;
  }

  void write(const T* values, const Int<T>* positions, int64_t image, int64_t row) const {
    const auto offset = [&](const Tensor& t) { return image * t.stride[0] + row * t.stride[2]; };
    const Tensor &output = call.output, &where = call.positions;
    unpack(values, width, shape.k, shape.pooled_w, at_mutable(output, offset(output)), output.dtype, output.stride[1],
           output.stride[3]);
    if (where)
      unpack_to(positions, width, shape.k, shape.pooled_w, static_cast<uint8_t*>(where.data) + offset(where),
                where.stride[1], where.stride[3]);
  }
};

}  // namespace
}  // namespace FASTSEG_ISA
}  // namespace fastseg

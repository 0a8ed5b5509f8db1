// Winograd's F(2x2, 3x3) between tensors whose rows are contiguous (NCHW), where nothing is pooled. Vectors run along a
// row's windows, so that input and output are read and written as they lie; the products are matrix products, output
// channels x channels by channels x windows.
#pragma once

#include <utility>

#include "convolution/conv_relu_pool2d.h"
#include "convolution/conv_tile-inl.h"
#include "convolution/register_tile-inl.h"
#include "convolution/winograd-inl.h"
#include "convolution/winograd_kernels-inl.h"
#include "core/parallel.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

// Elements of two vectors, each quarter (16 bytes) of which is made of the same quarters of x and y.
template <class T>
struct Quarters {
  static constexpr int kElements = 16 / sizeof(T), kHalf = kElements / 2;
  using Lanes = std::make_integer_sequence<int, kLanes<T>>;

  static constexpr int quarter(int lane) { return lane / kElements * kElements; }
  static constexpr int of_pair(int lane, int parity) {
    const int place = lane % kElements;
    return quarter(lane) + place % kHalf * 2 + parity + (place < kHalf ? 0 : kLanes<T>);
  }
  static constexpr int of_half(int lane, int half) {
    return quarter(lane) + half * kHalf + lane % kElements / 2 + (lane % 2 == 0 ? 0 : kLanes<T>);
  }

  template <int Parity, int... Lane>
  static FASTSEG_INLINE Vec<T> pick(Vec<T> x, Vec<T> y, std::integer_sequence<int, Lane...>) {
    return FASTSEG_SHUFFLE(x, y, of_pair(Lane, Parity)...);
  }
  template <int Half, int... Lane>
  static FASTSEG_INLINE Vec<T> mix(Vec<T> x, Vec<T> y, std::integer_sequence<int, Lane...>) {
    return FASTSEG_SHUFFLE(x, y, of_half(Lane, Half)...);
  }
};

// Every second of two vectors' neighbours in memory, from the first or the second on, in an order that join() undoes.
template <class T, int Parity>
FASTSEG_INLINE Vec<T> every_second(Vec<T> x, Vec<T> y) {
  return Quarters<T>::template pick<Parity>(x, y, typename Quarters<T>::Lanes{});
}

// The first (0) or the second (1) of two vectors of neighbours, of which `even` and `odd` are every second.
template <class T, int Half>
FASTSEG_INLINE Vec<T> join(Vec<T> even, Vec<T> odd) {
  return Quarters<T>::template mix<Half>(even, odd, typename Quarters<T>::Lanes{});
}

constexpr int64_t kPlanesBand = 6;  // rows of windows to a task at most: two rows of input in as many are read twice

template <class T>
struct WinogradPlanes {
  static constexpr int kRows = 4;                        // output channels in a tile of registers
  static constexpr int kGroups = kAccumulators / kRows;  // and vectors of windows
  static constexpr int64_t kTile = kGroups * kLanes<T>;
  static constexpr int64_t kTiles = 2;  // in work together
  static constexpr int64_t kTogether = kTiles * kTile;

  const ConvReluPool2dWinogradForward& call;
  const ConvShape shape;
  const int64_t windows_h;
  const int64_t groups_w;  // vectors of windows in a row
  const int64_t pitch;     // of a packed row
  const int64_t band;      // rows of windows to a task
  const int64_t bands;     // of an image
  WinogradKernels<T> kernels;
  bool* safe = nullptr;  // shared by all tasks

  explicit WinogradPlanes(const ConvReluPool2dWinogradForward& c)
      : call(c),
        shape(c.input, c.weight, c.output, c.geometry),
        windows_h(ceil_div(shape.convolved_h, kPoolSide)),
        groups_w(ceil_div(ceil_div(shape.convolved_w, kPoolSide), kLanes<T>)),
        pitch(round_up(kPoolSide * groups_w * kLanes<T> + kSide - kPoolSide, kLanes<T>)),
        band(choose_band()),
        bands(ceil_div(windows_h, band)),
        kernels(c) {}

  int64_t choose_band() const {
    const int64_t shared = ceil_div(shape.n * windows_h, max_of(kTasksWanted, 2 * int64_t{call.threads}));
    return max_of(min_of(shared, kPlanesBand), 1);
  }

  // Whether a call's tensors are such, of T itself, with rows that fill vectors of windows, and of so few channels that
  // patches of all products stay in the cache. Measured with AVX2 (AMD Zen 3, 2 threads, 2026-11-28) against the kernel
  // for channels: 0.82 to 0.97 times as long on rows of 48 to 256 pixels of 16 to 96 channels, 1.2 to 1.3 times on rows
  // of 24 and 12, which leave a quarter of the vectors empty.
  static bool serves(const ConvReluPool2dWinogradForward& call) {
    const auto in_rows = [](const Tensor& tensor) {
      return !tensor || (tensor.dtype == kDType<T> && tensor.stride[3] == 1);
    };
    const ConvPoolGeometry& g = call.geometry;
    const bool plain = g.pool_size[0] == 1 && g.dilation[0] == 1 && g.dilation[1] == 1 && !call.positions;
    const int64_t windows_w = ceil_div(call.output.size[3], kPoolSide);
    const bool full = 5 * round_up(windows_w, kLanes<T>) <= 6 * windows_w;
    return plain && full && patches_fit<T>(call.weight.size[1]) && in_rows(call.input) && in_rows(call.output) &&
           in_rows(call.passed);
  }

  bool empty() const { return tasks() * kernels.blocks == 0; }

  int64_t tasks() const { return shape.n * bands; }

  void prepare(void* workspace, Span some, bool transformed = false) { kernels.prepare(workspace, some, transformed); }

  // Packs the input's rows as [c][rows][pitch], with the padding's zeros written out, and says whether all are safe.
  bool pack_rows(int64_t image, Span rows, T* target) const {
    const int64_t left = min_of(call.geometry.padding[1], pitch), inside = min_of(shape.w, pitch - left);
    IntVec<T> largest = {};
    for (int64_t c = 0; c < shape.c; ++c)
      for (int64_t row = rows.begin; row < rows.end; ++row, target += pitch) {
        const bool exists = row >= 0 && row < shape.h;
        memset(target, 0, static_cast<size_t>(exists ? left : pitch) * sizeof(T));
        if (!exists) continue;
        memset(target + left + inside, 0, static_cast<size_t>(pitch - left - inside) * sizeof(T));
        const T* values = row_of<T>(call.input, image, row) + c * call.input.stride[1];
        const T* passed = call.passed ? row_of<T>(call.passed, image, row) + c * call.passed.stride[1] : nullptr;
        if (passed) relu_mask(passed, values, inside, target + left), values = target + left;
        largest = copy_row(values, inside, call.input.stride[1], target + left, largest);
      }
    return largest_lane<T>(largest) <= kernels.largest_input;
  }

  // Copies a row, and asks for what lies `ahead` of it, the row of the next channel, which the hardware doesn't
  // foresee.
  static FASTSEG_INLINE IntVec<T> copy_row(const T* from, int64_t elements, int64_t ahead, T* target,
                                           IntVec<T> largest) {
    int64_t i = 0;
    for (; i + kLanes<T> <= elements; i += kLanes<T>) {
      __builtin_prefetch(from + i + ahead);
      const Vec<T> values = load(from + i);
      store<T>(target + i, values);
      largest = larger_magnitudes<T>(largest, values);
    }
    for (; i < elements; ++i) {
      target[i] = from[i];
      largest = larger_magnitudes<T>(largest, broadcast(from[i]));
    }
    return largest;
  }

  // A line of B^T patch B of a vector of windows, of two of the patches' rows.
  template <int Line>
  static FASTSEG_INLINE void transform_line(const T* upper, const T* lower, int64_t plane, T* target) {
    constexpr int64_t kFrom[kSide] = {0, kLanes<T>, kPoolSide, kPoolSide + kLanes<T>};
    Vec<T> line[kSide];
#pragma GCC unroll 4
    for (int i = 0; i < kSide; ++i) {
      const Vec<T> a = load(upper + kFrom[i]), b = load(lower + kFrom[i]);
      line[i] = Line == 1 ? a + b : Line == 2 ? b - a : a - b;
    }
    Vec<T> d[kSide] = {every_second<T, 0>(line[0], line[1]), every_second<T, 1>(line[0], line[1]),
                       every_second<T, 0>(line[2], line[3]), every_second<T, 1>(line[2], line[3])};
    transform_patch_line(d);
#pragma GCC unroll 4
    for (int x = 0; x < kSide; ++x) store<T>(target + (kSide * Line + x) * plane, d[x]);
  }

  // Transforms the patches of a tile's windows: [products][plane], each plane [c][kTile]. `from`: where the tile's
  // vectors of windows begin in a channel's rows.
  FASTSEG_NOINLINE void transform(const T* rows, const int64_t (&from)[kGroups], int64_t channel_pitch, int64_t plane,
                                  T* target) const {
    const int64_t step = pitch;
    for (int64_t c = 0; c < shape.c; ++c, rows += channel_pitch)
      for (int v = 0; v < kGroups; ++v, target += kLanes<T>) {
        const T* const row = rows + from[v];
        transform_line<0>(row, row + 2 * step, plane, target);
        transform_line<1>(row + step, row + 2 * step, plane, target);
        transform_line<2>(row + step, row + 2 * step, plane, target);
        transform_line<3>(row + step, row + 3 * step, plane, target);
      }
  }

  // One product of kRows output channels, whose weights are `step` apart, for a tile's windows: [kRows][kTogether].
  FASTSEG_NOINLINE void multiply(const T* weights, int64_t step, const T* patches, T* products) const {
    Vec<T> sum[kRows][kGroups] = {};
#pragma GCC unroll 2
    for (int64_t c = 0; c < shape.c; ++c, weights += step, patches += kTile) {
      Vec<T> patch[kGroups];
#pragma GCC unroll 6
      for (int v = 0; v < kGroups; ++v) patch[v] = load(patches + v * kLanes<T>);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const Vec<T> weight = broadcast(weights[r]);
#pragma GCC unroll 6
        for (int v = 0; v < kGroups; ++v) sum[r][v] += weight * patch[v];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 6
      for (int v = 0; v < kGroups; ++v) store(products + r * kTogether + v * kLanes<T>, sum[r][v]);
  }

  // Writes a vector of windows of one output channel to the first `rows` rows and `columns` columns of `target`.
  template <bool Relu>
  FASTSEG_INLINE void finish(const T* products, int64_t plane, Vec<T> shift, int64_t rows, int64_t columns, T* target,
                             int64_t row_step) const {
    Window<Vec<T>> sums = window_of(products, plane);
#pragma GCC unroll 2
    for (int y = 0; y < kPoolSide; ++y) {
      if (y >= rows) break;
#pragma GCC unroll 2
      for (int x = 0; x < kPoolSide; ++x) {
        Vec<T>& value = sums.values[y][x];
        value += shift;
        if (Relu) value = value > Vec<T>{} ? value : Vec<T>{};
      }
      const Vec<T> first = join<T, 0>(sums.values[y][0], sums.values[y][1]);
      const Vec<T> second = join<T, 1>(sums.values[y][0], sums.values[y][1]);
      T* to = target + y * row_step;
      if (columns >= kPoolSide * kLanes<T>) {
        store<T>(to, first), store<T>(to + kLanes<T>, second);
      } else {
        T both[kPoolSide * kLanes<T>];
        store<T>(both, first), store<T>(both + kLanes<T>, second);
        memcpy(to, both, static_cast<size_t>(columns) * sizeof(T));
      }
    }
  }

  // The same of the vectors [first, first + some) of a band, whose first row of windows is `top`, to an output
  // channel's rows. While they are written, the next channel's are asked for: they lie far away.
  template <bool Relu>
  FASTSEG_NOINLINE void finish_channel(const T* products, int64_t plane, T shift, int64_t top, int64_t first,
                                       int64_t some, T* target) const {
    const int64_t row_step = call.output.stride[2], ahead = call.output.stride[1];
    int64_t row = kPoolSide * (top + first / groups_w), group = first % groups_w;
    for (int64_t v = 0; v < some; ++v, products += kLanes<T>) {
      const int64_t column = kPoolSide * kLanes<T> * group;
      T* to = target + row * row_step + column;
      for (int64_t i = 0; i < kPoolSide * kLanes<T>; i += kLine<T>)
        for (int y = 0; y < kPoolSide; ++y) __builtin_prefetch(to + ahead + y * row_step + i, 1);
      finish<Relu>(products, plane, broadcast(shift), shape.convolved_h - row, shape.convolved_w - column, to,
                   row_step);
      if (++group == groups_w) group = 0, row += kPoolSide;
    }
  }

  bool run(int64_t task) const {
    const int64_t image = task / bands, top = task % bands * band, bottom = min_of(top + band, windows_h);
    const Span rows = {kPoolSide * top - call.geometry.padding[0],
                       kPoolSide * (bottom - 1) - call.geometry.padding[0] + kSide};
    const int64_t channel_pitch = rows.size() * pitch, input_elements = shape.c * channel_pitch;
    const int64_t patch_plane = shape.c * kTogether + kRowPadding, product_plane = kBlock<T> * kTogether + kRowPadding;
    const int64_t elements = input_elements + kProducts * (patch_plane + product_plane);
    T* input = static_cast<T*>(scratch(elements * int64_t{sizeof(T)}));
    if (input == nullptr) return false;
    T* patches = input + input_elements;
    T* products = patches + kProducts * patch_plane;
    if (!may_go_on(pack_rows(image, rows, input), safe)) return true;
    const int64_t groups = (bottom - top) * groups_w;
    for (int64_t first = 0; first < groups; first += kTiles * kGroups) {
      const int64_t some = min_of(kTiles * kGroups, groups - first);
      for (int64_t tile = 0; tile * kGroups < some; ++tile) {
        int64_t from[kGroups];  // past the last vector, of the last one again
        for (int v = 0; v < kGroups; ++v) {
          const int64_t group = min_of(first + tile * kGroups + v, groups - 1);
          from[v] = kPoolSide * (group / groups_w * pitch + group % groups_w * kLanes<T>);
        }
        transform(input, from, channel_pitch, patch_plane, patches + tile * shape.c * kTile);
      }
      for (int64_t block = kernels.at_once.begin; block < kernels.at_once.end; ++block) {
        multiply_block(block, patches, patch_plane, some, products, product_plane);
        finish_block(block, products, product_plane, image, top, first, some);
      }
    }
    return true;
  }

  // All products of a block of output channels: [products][plane], each plane [channel][kTogether].
  void multiply_block(int64_t block, const T* patches, int64_t patch_plane, int64_t groups, T* products,
                      int64_t product_plane) const {
    const int64_t step = kernels.vectors(block) * kLanes<T>, count = min_of(shape.k - block * kBlock<T>, step);
    for (int64_t product = 0; product < kProducts; ++product)
      for (int64_t tile = 0; tile * kGroups < groups; ++tile)
        for (int64_t k = 0; k < count; k += kRows)
          multiply(kernels.weights_of(block) + product * kernels.weight_plane() + k, step,
                   patches + product * patch_plane + tile * shape.c * kTile,
                   products + product * product_plane + k * kTogether + tile * kTile);
  }

  void finish_block(int64_t block, const T* products, int64_t product_plane, int64_t image, int64_t top, int64_t first,
                    int64_t some) const {
    const auto finish_one = call.relu ? &WinogradPlanes::finish_channel<true> : &WinogradPlanes::finish_channel<false>;
    const Span channels = {block * kBlock<T>, min_of((block + 1) * kBlock<T>, shape.k)};
    for (int64_t k = channels.begin; k < channels.end; ++k, products += kTogether) {
      const T shift = kernels.bias_of(block)[k - channels.begin];
      T* plane = static_cast<T*>(at_mutable(call.output, image * call.output.stride[0] + k * call.output.stride[1]));
      (this->*finish_one)(products, product_plane, shift, top, first, some, plane);
    }
  }
};

}  // namespace
}  // namespace FASTSEG_ISA
}  // namespace fastseg

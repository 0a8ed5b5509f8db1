// Winograd's F(2x2, 3x3) under a pool of 2x2 (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks",
// 2015). A window's four values come from 16 products per channel in place of 36:
//
//   window = A^T [ sum over c of (G weight G^T) * (B^T patch B) ] A     with a patch of 4 x 4 pixels, * by element
//
// The transforms add what a plain convolution never adds. Where that could overflow, or where anything isn't finite
// (infinities would become NaN beside them), the direct kernel has to do the call.
#pragma once

#include "convolution/conv_tile-inl.h"
#include "core/cache.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

constexpr int kSide = 4;                  // of a patch
constexpr int kProducts = kSide * kSide;  // per window and channel
constexpr int kKernelSide = 3, kKernelTaps = kKernelSide * kKernelSide;
constexpr int kPoolSide = 2;

// Windows in work together: as often is a block of weights, or of sums, used that was read from memory.
constexpr int64_t kLeastWindows = 24, kMostWindows = 96;

template <class T>
constexpr int64_t kLine = 64 / sizeof(T);  // elements of a line of the cache

constexpr int64_t kTasksWanted = 8;  // into which a call is divided at least, where that is cheap

// How much larger than |patch| * |weight| a partial sum over one channel may become: |B^T patch B| <= 4 |patch|,
// |G weight G^T| <= 9/4 |weight|, and a value of the window adds nine of their products.
constexpr int kGrowth = 81;

// B^T d, for a line of four vectors.
template <class V>
FASTSEG_INLINE void transform_patch_line(V (&d)[kSide]) {
  const V first = d[0] - d[2], second = d[1] + d[2], third = d[2] - d[1], fourth = d[1] - d[3];
  d[0] = first, d[1] = second, d[2] = third, d[3] = fourth;
}

// B^T d B, for d[row][column].
template <class V>
FASTSEG_INLINE void transform_patch(V (&d)[kSide][kSide]) {
#pragma GCC unroll 4
  for (int x = 0; x < kSide; ++x) {
    V line[kSide] = {d[0][x], d[1][x], d[2][x], d[3][x]};
    transform_patch_line(line);
#pragma GCC unroll 4
    for (int y = 0; y < kSide; ++y) d[y][x] = line[y];
  }
#pragma GCC unroll 4
  for (int y = 0; y < kSide; ++y) transform_patch_line(d[y]);
}

// G g G^T, for the taps g[3 * row + column].
template <class V>
FASTSEG_INLINE void transform_kernel(const V (&g)[kKernelTaps], V (&u)[kSide][kSide]) {
  const auto line = [](V a, V b, V c, V* target, int step) {
    const V ends = (a + c) / 2, middle = b / 2;
    target[0] = a, target[step] = ends + middle, target[2 * step] = ends - middle, target[3 * step] = c;
  };
  V rows[kKernelSide][kSide];
  for (int y = 0; y < kKernelSide; ++y) line(g[3 * y], g[3 * y + 1], g[3 * y + 2], rows[y], 1);
  for (int x = 0; x < kSide; ++x) line(rows[0][x], rows[1][x], rows[2][x], &u[0][x], kSide);
}

// A window's four values, to which the products arrive column by column: A^T m A.
template <class V>
struct Window {
  V values[kPoolSide][kPoolSide];

  template <int Column>
  FASTSEG_INLINE void add(const V (&m)[kSide]) {
    const V line[kPoolSide] = {m[0] + m[1] + m[2], m[1] - m[2] - m[3]};
#pragma GCC unroll 2
    for (int y = 0; y < kPoolSide; ++y) {
      if (Column == 0) values[y][0] = line[y];
      if (Column == 1) values[y][0] += line[y], values[y][1] = line[y];
      if (Column == 2) values[y][0] += line[y], values[y][1] -= line[y];
      if (Column == 3) values[y][1] -= line[y];
    }
  }
};

// The window of products that lie a plane apart.
template <class T>
FASTSEG_INLINE Window<Vec<T>> window_of(const T* products, int64_t plane) {
  const auto column_of = [&](int x, Vec<T>(&m)[kSide]) {
#pragma GCC unroll 4
    for (int y = 0; y < kSide; ++y) m[y] = load(products + (y * kSide + x) * plane);
  };
  Window<Vec<T>> window;
  Vec<T> m[kSide];
  column_of(0, m), window.template add<0>(m);
  column_of(1, m), window.template add<1>(m);
  column_of(2, m), window.template add<2>(m);
  column_of(3, m), window.template add<3>(m);
  return window;
}

// Whether the patches of few windows of so many channels stay in the cache, of all products.
template <class T>
bool patches_fit(int64_t channels) {
  return kProducts * kLeastWindows * channels * int64_t{sizeof(T)} <= kWinogradAllProductsBytes;
}

// Some channels (axis 1) or columns (axis 3) of [N, C, H, W]; a tensor that isn't there stays so.
inline Tensor part_of(const Tensor& tensor, int axis, Span span) {
  Tensor part = tensor;
  if (tensor) part.data = at_mutable(tensor, span.begin * tensor.stride[axis]);
  part.size[axis] = span.size();
  return part;
}

// Columns of packed rows that hold the patches of `windows` neighbours.
constexpr int64_t patches_width(int64_t windows) {
  return kPoolSide * windows + kSide - kPoolSide;
}

// Transforms the patches of some of the windows of packed rows of `features` channels, which are counted row by row,
// `windows_w` to a row. target: [products][plane], each plane [windows][features, rounded up to whole vectors].
template <class T>
void transform_patches(const T* rows, int64_t features, int64_t windows_w, Span windows, int64_t plane, T* target) {
  const int64_t pitch = patches_width(windows_w) * features, step = round_up(features, kLanes<T>);
  int64_t row = windows.begin / windows_w, column = windows.begin % windows_w;
  for (int64_t window = windows.begin; window < windows.end; ++window, target += step) {
    const T* patch = rows + kPoolSide * (row * pitch + column * features);
    for (int64_t c = 0; c < step; c += kLanes<T>) {
      Vec<T> d[kSide][kSide];
#pragma GCC unroll 4
      for (int y = 0; y < kSide; ++y)
#pragma GCC unroll 4
        for (int x = 0; x < kSide; ++x) d[y][x] = load(patch + y * pitch + x * features + c);
      transform_patch(d);
#pragma GCC unroll 4
      for (int y = 0; y < kSide; ++y)
#pragma GCC unroll 4
        for (int x = 0; x < kSide; ++x) store<T>(target + (y * kSide + x) * plane + c, d[y][x]);
    }
    if (++column == windows_w) column = 0, ++row;
  }
}

// Which windows reach over the convolution's last row or (by lane) last column.
template <class T>
struct Clip {
  bool any, row;
  IntVec<T> column;
};

// The maximum of relu(window + bias) and its position. No value is NaN here.
template <class T>
FASTSEG_INLINE void pool_window(Window<Vec<T>> window, Vec<T> bias, const Clip<T>& clip, T* value, Int<T>* position) {
  auto& values = window.values;
#pragma GCC unroll 2
  for (int y = 0; y < kPoolSide; ++y)
#pragma GCC unroll 2
    for (int x = 0; x < kPoolSide; ++x) values[y][x] += bias;
  if (clip.any) {
    const Vec<T> nothing = broadcast(static_cast<T>(-__builtin_inf()));
    if (clip.row) values[1][0] = values[1][1] = nothing;
    for (int y = 0; y < kPoolSide; ++y) values[y][1] = clip.column ? nothing : values[y][1];
  }
  Vec<T> best = values[0][0];
  IntVec<T> where = {};
#pragma GCC unroll 4
  for (int i = 1; i < kPoolSide * kPoolSide; ++i) {
    const Vec<T> candidate = values[i / kPoolSide][i % kPoolSide];
    const IntVec<T> better = candidate > best;  // strictly, so that the first of equal maxima stays
    best = better ? candidate : best;
    where = better ? i - IntVec<T>{} : where;
  }
  const IntVec<T> passes = best > Vec<T>{};
  store<T>(value, passes ? best : Vec<T>{});
  where = passes ? where : kCut - IntVec<T>{};
  memcpy(position, &where, sizeof where);
}

// The larger of magnitudes, as integers: these have the order of the numbers, above which is infinity, and above that
// NaN.
template <class T>
FASTSEG_INLINE IntVec<T> larger_magnitudes(IntVec<T> largest, Vec<T> values) {
  const IntVec<T> magnitudes = bits_of<T>(values) & ~bits_of<T>(-Vec<T>{});
  return magnitudes > largest ? magnitudes : largest;
}

template <class T>
T largest_lane(IntVec<T> magnitudes) {
  Int<T> largest = 0;
  for (int lane = 0; lane < kLanes<T>; ++lane) largest = magnitudes[lane] > largest ? magnitudes[lane] : largest;
  T value;
  memcpy(&value, &largest, sizeof value);
  return value;
}

// Of a whole number of vectors; NaN where any is.
template <class T>
T largest_magnitude(const T* values, int64_t elements) {
  IntVec<T> largest = {};
  for (int64_t i = 0; i < elements; i += kLanes<T>) largest = larger_magnitudes<T>(largest, load(values + i));
  return largest_lane<T>(largest);
}

// Whether no task has met an input that isn't safe, this one included. `safe` is shared by all tasks.
inline bool may_go_on(bool task_is_safe, bool* safe) {
  if (!task_is_safe) __atomic_store_n(safe, false, __ATOMIC_RELAXED);
  return __atomic_load_n(safe, __ATOMIC_RELAXED);
}

// Up to which magnitude of the input nothing overflows; negative where weights or bias aren't finite. `parameters` are
// the largest magnitudes of parts of them, `growth` how much larger than |input| * |parameters| a sum may become.
template <class T>
T largest_safe_input(const T* parameters, int64_t parts, int64_t growth) {
  T largest = 1;
  for (int64_t part = 0; part < parts; ++part) {
    if (!(parameters[part] <= kLargestFinite<T>)) return -1;
    largest = parameters[part] > largest ? parameters[part] : largest;
  }
  return kLargestFinite<T> / static_cast<T>(growth) / largest;
}

}  // namespace
}  // namespace FASTSEG_ISA
}  // namespace fastseg

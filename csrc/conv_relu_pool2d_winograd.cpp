// conv_relu_pool2d, forward, the Winograd road: 3x3 convolutions and 2x2 pools by F(2x2, 3x3) (Lavin and Gray, "Fast
// Algorithms for Convolutional Neural Networks", 2015). A window's four values come from 16 products per channel in
// place of 36, and the window is one output tile: it is pooled in registers, and only pooled values are written.
//
//   window = A^T [ sum over c of (G weight G^T) * (B^T patch B) ] A     with a patch of 4 x 4 pixels, * by element
//
// The transforms add what a plain convolution never adds: where that could overflow, or where anything isn't finite,
// the direct kernel does the call.
#include "conv_relu_pool2d.h"
#include "conv_tile.h"
#include "parallel.h"
#include "pool_tile.h"
#include "register_tile.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

constexpr int kSide = 4;                      // of a patch
constexpr int kProducts = kSide * kSide;      // per window and channel
constexpr int kKernelSide = 3, kPoolSide = 2;

// Of the second-level cache: windows in work with their transformed patches, and a band's packed input.
constexpr int64_t kPatchBytes = 192 * 1024;
constexpr int64_t kBandBytes = 128 * 1024;
constexpr int64_t kLeastWindows = 24;   // in work together: as often is a block of weights used that was read from memory
constexpr int64_t kMostWindows = 96;
constexpr int64_t kTasksWanted = 8;     // where there are fewer bands, a band's channels are divided too

// How much larger than |patch| * |weight| a partial sum over one channel may become: |B^T patch B| <= 4 |patch|,
// |G weight G^T| <= 9/4 |weight|, and a value of the window adds nine of their products.
constexpr int kGrowth = 81;

template <class T>
constexpr T kLargestFinite = sizeof(T) == sizeof(float) ? static_cast<T>(__FLT_MAX__) : static_cast<T>(__DBL_MAX__);

// Four numbers (or vectors) of a line, transformed.
template <class V>
FASTSEG_INLINE void transform_patch_line(V (&d)[kSide]) {
  const V first = d[0] - d[2], second = d[1] + d[2], third = d[2] - d[1], fourth = d[1] - d[3];
  d[0] = first, d[1] = second, d[2] = third, d[3] = fourth;
}

template <class V>
FASTSEG_INLINE void transform_kernel_line(const V& a, const V& b, const V& c, V (&u)[kSide]) {
  const V ends = (a + c) / 2, middle = b / 2;
  u[0] = a, u[1] = ends + middle, u[2] = ends - middle, u[3] = c;
}

// Some columns of [N, C, H, W]; a tensor that isn't there stays so.
inline Tensor columns_of(const Tensor& tensor, Span columns) {
  Tensor part = tensor;
  if (tensor) part.data = at_mutable(tensor, columns.begin * tensor.stride[3]);
  part.size[3] = columns.size();
  return part;
}

template <class T>
struct Winograd {
  const ConvReluPool2dForward& call;
  const ConvShape shape;
  const int64_t blocks;    // of output channels
  const int64_t channels;  // of the input, rounded up to whole vectors
  const int64_t packed_w;  // columns of a packed input row
  const int64_t band;      // pooled rows to a task
  const int64_t bands;     // of an image
  const int64_t groups;    // tasks among which a band's blocks are divided
  T* weights = nullptr;    // [blocks][products][c][block]
  T* bias = nullptr;       // [blocks][block]
  T largest_input = 0;     // up to which nothing overflows
  bool* safe = nullptr;    // shared by all tasks

  explicit Winograd(const ConvReluPool2dForward& c)
      : call(c),
        shape(c.input, c.weight, c.output, c.geometry),
        blocks(ceil_div(shape.k, kBlock<T>)),
        channels(round_up(shape.c, kLanes<T>)),
        packed_w(kPoolSide * shape.pooled_w + kSide - kPoolSide),
        band(choose_band()),
        bands(ceil_div(shape.pooled_h, band)),
        groups(least(blocks, ceil_div(kTasksWanted, most(shape.n * bands, 1)))) {}

  int64_t choose_band() const {
    const int64_t row_bytes = packed_w * shape.c * int64_t{sizeof(T)};
    const int64_t rows = (kBandBytes / row_bytes - (kSide - kPoolSide)) / kPoolSide;
    return least(most(rows, ceil_div(kLeastWindows, shape.pooled_w)), shape.pooled_h);
  }

  int vectors(int64_t block) const { return shape.k - block * kBlock<T> > kLanes<T> ? 2 : 1; }

  int64_t block_elements() const { return kProducts * shape.c * kBlock<T>; }

  int64_t workspace_elements() const { return blocks * (block_elements() + kBlock<T> + 1); }

  // Transforms the weights of one block of channels, and returns the largest of their magnitudes (NaN where one is).
  T* maxima() const { return bias + blocks * kBlock<T>; }

  bool transform_weights(int64_t block) const {
    const int64_t lanes = vectors(block) * kLanes<T>, plane = shape.c * lanes;
    const int64_t elements = kKernelSide * kKernelSide * plane;
    T* taps = static_cast<T*>(scratch(elements * int64_t{sizeof(T)}));  // [kernel row][kernel column][c][lanes]
    if (taps == nullptr) return false;
    memset(taps, 0, static_cast<size_t>(elements) * sizeof(T));
    const Tensor& weight = call.weight;
    for (int64_t k = block * kBlock<T>; k < least((block + 1) * kBlock<T>, shape.k); ++k) {
      for (int tap = 0; tap < kKernelSide * kKernelSide; ++tap)
        pack(at(weight, k * weight.stride[0] + tap / kKernelSide * weight.stride[2] +
                            tap % kKernelSide * weight.stride[3]),
             weight.dtype, shape.c, 1, weight.stride[1], 1, taps + tap * plane + k % kBlock<T>, lanes);
      if (call.bias) pack(at(call.bias, k * call.bias.stride[0]), call.bias.dtype, 1, 1, 1, 1, bias + k, 1);
    }
    maxima()[block] = largest_magnitude(taps, elements);
    T* target = weights + block * block_elements();
    for (int64_t i = 0; i < plane; i += kLanes<T>) {
      Vec<T> rows[kKernelSide][kSide];
      for (int row = 0; row < kKernelSide; ++row) {
        const T* source = taps + row * kKernelSide * plane + i;
        transform_kernel_line(load(source), load(source + plane), load(source + 2 * plane), rows[row]);
      }
      for (int column = 0; column < kSide; ++column) {
        Vec<T> u[kSide];
        transform_kernel_line(rows[0][column], rows[1][column], rows[2][column], u);
        for (int row = 0; row < kSide; ++row) store<T>(target + (row * kSide + column) * plane + i, u[row]);
      }
    }
    return true;
  }

  // Of a whole number of vectors; NaN where one is.
  static T largest_magnitude(const T* values, int64_t elements) {
    Vec<T> largest = {}, invalid = {};
    for (int64_t i = 0; i < elements; i += kLanes<T>) {
      const Vec<T> value = load(values + i), magnitude = value < Vec<T>{} ? -value : value;
      largest = magnitude > largest ? magnitude : largest;
      invalid += value - value;  // NaN for NaN and infinities
    }
    T result = 0;
    for (int lane = 0; lane < kLanes<T>; ++lane) result = largest[lane] > result ? largest[lane] : result;
    for (int lane = 0; lane < kLanes<T>; ++lane) result += invalid[lane];
    return result;
  }

  // Transforms the patches of windows [first, first + count) of a band, which are counted row by row.
  // target: [products][plane elements], each plane [windows][channels].
  void transform_patches(const T* input, int64_t first, int64_t count, int64_t plane, T* target) const {
    const int64_t pitch = packed_w * shape.c;
    int64_t row = first / shape.pooled_w, column = first % shape.pooled_w;
    for (int64_t window = 0; window < count; ++window, target += channels) {
      const T* patch = input + kPoolSide * (row * pitch + column * shape.c);
      for (int64_t c = 0; c < channels; c += kLanes<T>) {
        Vec<T> d[kSide][kSide];  // [column][row]
#pragma GCC unroll 4
        for (int x = 0; x < kSide; ++x) {
#pragma GCC unroll 4
          for (int y = 0; y < kSide; ++y) d[x][y] = load(patch + y * pitch + x * shape.c + c);
          transform_patch_line(d[x]);
        }
#pragma GCC unroll 4
        for (int y = 0; y < kSide; ++y) {
          Vec<T> line[kSide] = {d[0][y], d[1][y], d[2][y], d[3][y]};
          transform_patch_line(line);
#pragma GCC unroll 4
          for (int x = 0; x < kSide; ++x) store<T>(target + (y * kSide + x) * plane + c, line[x]);
        }
      }
      if (++column == shape.pooled_w) column = 0, ++row;
    }
  }

  // The products of all windows with one block of weights: [products][plane elements], each plane [windows][block].
  template <int Vectors>
  FASTSEG_NOINLINE void multiply(const T* patches, int64_t patch_plane, int64_t windows, int64_t block, T* products,
                                 int64_t product_plane) const {
    const Vec<T> zero[Vectors] = {};
    for (int64_t product = 0; product < kProducts; ++product) {
      const T* columns = weights + block * block_elements() + product * shape.c * Vectors * kLanes<T>;
      for (int64_t window = 0; window < windows; window += kPixels<Vectors>)
        multiply_tile<T, Vectors>(
            patches + product * patch_plane + window * channels, channels, [](int64_t c) { return c; }, shape.c,
            columns, zero, products + product * product_plane + window * Vectors * kLanes<T>);
    }
  }

  // values, positions: [windows][block], of windows [first, first + count) of the band that begins at `top`.
  void pool_products(const T* products, int64_t plane, int64_t block, int64_t top, int64_t first, int64_t count,
                     T* values, Int<T>* positions) const {
    const int64_t lanes = vectors(block) * kLanes<T>;
    int64_t row = first / shape.pooled_w, column = first % shape.pooled_w;
    for (int64_t window = 0; window < count; ++window) {
      const bool whole = kPoolSide * (top + row + 1) <= shape.convolved_h &&
                         kPoolSide * (column + 1) <= shape.convolved_w;
      for (int64_t lane = 0; lane < lanes; lane += kLanes<T>) {
        const int64_t offset = window * lanes + lane;
        Vec<T> sums[kSide][kPoolSide];  // [product column][window row]
#pragma GCC unroll 4
        for (int x = 0; x < kSide; ++x) {
          Vec<T> m[kSide];
#pragma GCC unroll 4
          for (int y = 0; y < kSide; ++y) m[y] = load(products + (y * kSide + x) * plane + offset);
          sums[x][0] = m[0] + m[1] + m[2];
          sums[x][1] = m[1] - m[2] - m[3];
        }
        const Vec<T> shift = load(bias + block * kBlock<T> + lane);
        T convolved[kPoolSide][kPoolSide * kLanes<T>];
#pragma GCC unroll 2
        for (int y = 0; y < kPoolSide; ++y) {
          store<T>(convolved[y], sums[0][y] + sums[1][y] + sums[2][y] + shift);
          store<T>(convolved[y] + kLanes<T>, sums[1][y] - sums[2][y] - sums[3][y] + shift);
        }
        const T* rows[kPoolSide] = {convolved[0], convolved[1]};
        if (whole) {
          pool_window<T, kPoolSide, kPoolSide>(rows, 0, kLanes<T>, kPoolSide, kPoolSide, 0, kPoolSide, values + offset,
                                               positions + offset);
        } else {
          pool_window<T, 0, 0>(rows, 0, kLanes<T>, least(shape.convolved_h - kPoolSide * (top + row), kPoolSide),
                               least(shape.convolved_w - kPoolSide * column, kPoolSide), 0, kPoolSide, values + offset,
                               positions + offset);
        }
      }
      if (++column == shape.pooled_w) column = 0, ++row;
    }
  }

  bool run(int64_t task) const {
    const int64_t group = task % groups, image = task / groups / bands, top = task / groups % bands * band;
    const Span group_blocks = {group * blocks / groups, (group + 1) * blocks / groups};
    const int64_t pooled_rows = least(band, shape.pooled_h - top), windows = pooled_rows * shape.pooled_w;
    const Span rows = {kPoolSide * top - call.geometry.padding[0],
                       kPoolSide * (top + pooled_rows - 1) - call.geometry.padding[0] + kSide};
    const int64_t input_elements = round_up(rows.size() * packed_w * shape.c, kLanes<T>) + kLanes<T>;

    // As many windows at a time as fit the cache, evenly divided, in whole tiles of registers.
    const int64_t fitting = kPatchBytes / (kProducts * channels * int64_t{sizeof(T)});
    const int64_t pieces = ceil_div(windows, least(most(fitting, kLeastWindows), kMostWindows));
    const int64_t piece = round_up(ceil_div(windows, pieces), kWidestTile);
    const int64_t patch_plane = piece * channels + kRowPadding, product_plane = piece * kBlock<T> + kRowPadding;

    const int64_t elements = input_elements + kProducts * (patch_plane + product_plane) + 2 * piece * kBlock<T>;
    T* input = static_cast<T*>(scratch(elements * int64_t{sizeof(T)}));
    if (input == nullptr) return false;
    T* patches = input + input_elements;
    T* products = patches + kProducts * patch_plane;
    T* values = products + kProducts * product_plane;
    Int<T>* positions = reinterpret_cast<Int<T>*>(values + piece * kBlock<T>);

    memset(input + input_elements - 2 * kLanes<T>, 0, 2 * kLanes<T> * sizeof(T));
    pack_input(call.input, shape, call.geometry, image, rows, packed_w, input);
    if (!(largest_magnitude(input, input_elements) <= largest_input)) __atomic_store_n(safe, false, __ATOMIC_RELAXED);
    if (!__atomic_load_n(safe, __ATOMIC_RELAXED)) return true;
    for (int64_t first = 0; first < windows; first += piece) {
      const int64_t count = least(piece, windows - first);
      transform_patches(input, first, count, patch_plane, patches);
      for (int64_t block = group_blocks.begin; block < group_blocks.end; ++block) {
        vectors(block) == 2 ? multiply<2>(patches, patch_plane, count, block, products, product_plane)
                            : multiply<1>(patches, patch_plane, count, block, products, product_plane);
        pool_products(products, product_plane, block, top, first, count, values, positions);
        write(values, positions, image, block, top, first, count);
      }
    }
    return true;
  }

  void write(const T* values, const Int<T>* positions, int64_t image, int64_t block, int64_t top, int64_t first,
             int64_t count) const {
    const int64_t lanes = vectors(block) * kLanes<T>;
    for (int64_t done = 0; done < count;) {
      const int64_t row = (first + done) / shape.pooled_w, column = (first + done) % shape.pooled_w;
      const Span columns = {column, least(column + count - done, shape.pooled_w)};
      unpack_pooled(values + done * lanes, positions + done * lanes, lanes, image, block * kBlock<T>,
                    least(lanes, shape.k - block * kBlock<T>), top + row, columns_of(call.output, columns), columns_of(call.positions, columns));
      done += columns.size();
    }
  }

  // Whether nothing in the weights is in the way; sets how large the input may be.
  bool prepare(void* workspace) {
    weights = static_cast<T*>(workspace);
    bias = weights + blocks * block_elements();
    memset(bias, 0, static_cast<size_t>(blocks * kBlock<T>) * sizeof(T));
    for_each_task(blocks, call.threads, [&](int64_t block) { return transform_weights(block); });
    T largest = 0;
    for (int64_t block = 0; block < blocks; ++block)
      if (!(maxima()[block] <= largest)) largest = maxima()[block];
    if (largest != largest) return false;
    const T limit = kLargestFinite<T> / kGrowth / static_cast<T>(shape.c);
    largest_input = largest > 1 ? limit / largest : limit;
    return true;
  }
};

// Whether it did.
template <class T>
bool forward(const ConvReluPool2dForward& call) {
  Winograd<T> kernel(call);
  if (kernel.shape.n * kernel.shape.k * kernel.shape.pooled_h * kernel.shape.pooled_w == 0) return true;
  Workspace workspace(kernel.workspace_elements() * int64_t{sizeof(T)});
  if (!kernel.prepare(workspace.data())) return false;
  bool safe = true;
  kernel.safe = &safe;
  for_each_task(kernel.shape.n * kernel.bands * kernel.groups, call.threads,
                [&](int64_t task) { return kernel.run(task); });
  return safe;
}

}  // namespace

void conv_relu_pool2d_winograd_forward(const ConvReluPool2dForward& call) {
  const bool done = call.input.dtype == DType::kFloat64 ? forward<double>(call) : forward<float>(call);
  if (!done) FASTSEG_ISA::conv_relu_pool2d_forward(call);
}

}  // namespace FASTSEG_ISA
}  // namespace fastseg

// conv_relu_pool2d, forward, by Winograd's algorithm for the stem of a ResNet: a 7x7 convolution of stride 2 under an
// overlapping 3x3 pool of stride 2. Pixels of one row parity and one column parity see only every second tap of the
// kernel: four convolutions of stride 1 whose kernels are at most 4x4, added up. Their 2x2 outputs come from
// F(2x2, 4x4) at the points 0, 1, -1, 2 and infinity: 25 products, of which a kernel of three taps leaves out those at
// infinity, so 81 in place of 196.
#pragma once

#include "convolution/conv_relu_pool2d.h"
#include "convolution/conv_tile-inl.h"
#include "convolution/pool_tile-inl.h"
#include "convolution/register_tile-inl.h"
#include "convolution/winograd-inl.h"
#include "core/parallel.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

constexpr int kStemKernel = 7, kStemTaps = 4, kStemSide = 5, kStemProducts = kStemSide * kStemSide;
constexpr int kStemRows = 4;              // of the convolution in work: two rows of tiles
constexpr int kStemGrowth = 36 * 7 * 25;  // |B^T d B| <= 36 |d|, |G g G^T| < 7 |g|, |A^T m A| <= 25 |m|

// B^T d. Ordered so that equal numbers leave exact zeros: ties stay ties.
template <class V>
FASTSEG_INLINE void transform_stem_line(V (&d)[kStemSide]) {
  const V a = d[3] - d[1], b = d[2] - d[1], c = d[3] - d[2];
  const V zero = a + 2 * (d[0] - d[2]), one = c - 2 * d[1], minus_one = c - 2 * b;
  const V infinity = (d[4] - d[2]) - 2 * a;
  d[0] = zero, d[1] = one, d[2] = minus_one, d[3] = a, d[4] = infinity;
}

template <class T>
struct WinogradStem {
  static constexpr int64_t kLargestBand = 28;  // pooled rows to a task: one row of tiles in as many is computed twice
  static constexpr int64_t kChunk = 24;        // tiles in work together, whose products fit the cache

  const ConvReluPool2dForward& call;
  const ConvShape shape;
  const int64_t blocks;    // of output channels
  const int64_t channels;  // of all parities, rounded up to whole vectors
  const int64_t tiles;     // of a row
  const int64_t packed_w;  // pixels of one parity in a packed row
  const int64_t band;      // pooled rows to a task
  const int64_t bands;     // of an image
  T* weights = nullptr;    // [blocks][products][terms][block]
  T* bias = nullptr;       // [blocks][block]
  T largest_input = 0;     // up to which nothing overflows
  bool* safe = nullptr;    // shared by all tasks

  explicit WinogradStem(const ConvReluPool2dForward& c)
      : call(c),
        shape(c.input, c.weight, c.output, c.geometry),
        blocks(ceil_div(shape.k, kBlock<T>)),
        channels(round_up(4 * shape.c, kLanes<T>)),
        tiles(ceil_div(shape.convolved_w, 2)),
        packed_w(2 * tiles + kStemTaps - 1),
        band(min_of(ceil_div(shape.pooled_h * shape.n, kTasksWanted), kLargestBand)),
        bands(ceil_div(shape.pooled_h, max_of(band, 1))) {}

  int64_t tasks() const { return shape.n * bands; }

  int vectors(int64_t block) const { return vectors_of<T>(shape.k, block); }

  // Channels are in the order (row parity, column parity, channel); odd parities have nothing at infinity.
  struct Chunks {
    int64_t offsets[2], count, length;
  };

  Chunks chunks_of(int product) const {
    const bool row_end = product / kStemSide == kStemTaps, column_end = product % kStemSide == kStemTaps;
    return {{0, 2 * shape.c}, column_end && !row_end ? 2 : 1, shape.c * (column_end ? 1 : row_end ? 2 : 4)};
  }

  int64_t block_elements() const { return kStemProducts * 4 * shape.c * kBlock<T>; }

  int64_t plain_elements() const { return round_up(shape.k * shape.taps(), kLanes<T>); }

  int64_t workspace_elements() const { return blocks * (block_elements() + kBlock<T>)+plain_elements() + 2; }

  void prepare(void* workspace) {
    weights = static_cast<T*>(workspace);
    bias = weights + blocks * block_elements();
    T* plain = bias + blocks * kBlock<T>;  // [k][kernel row][kernel column][c]
    T* maxima = plain + plain_elements();
    memset(workspace, 0, static_cast<size_t>(workspace_elements()) * sizeof(T));
    if (call.bias) pack(call.bias.data, call.bias.dtype, 1, shape.k, 0, call.bias.stride[0], bias, 0);
    for (int64_t k = 0; k < shape.k; ++k) {
      T* kernel = plain + k * shape.taps();
      pack_kernel(call.weight, shape, k, kernel, 1);
      for (int64_t c = 0; c < shape.c; ++c)
        for (int parity = 0; parity < 4; ++parity) transform_kernel_of(kernel + c, k, c, parity);
    }
    maxima[0] = largest_magnitude(plain, plain_elements());
    maxima[1] = largest_magnitude(bias, blocks * kBlock<T>);
    largest_input = largest_safe_input(maxima, 2, 4 * shape.c * kStemGrowth);
  }

  // Writes G g G^T of the taps of one parity of rows and columns where the products' terms lie.
  void transform_kernel_of(const T* kernel, int64_t k, int64_t c, int parity) const {
    constexpr double kG[kStemSide][kStemTaps] = {{1. / 2, 0, 0, 0},
                                                 {-1. / 2, -1. / 2, -1. / 2, -1. / 2},
                                                 {-1. / 6, 1. / 6, -1. / 6, 1. / 6},
                                                 {1. / 6, 2. / 6, 4. / 6, 8. / 6},
                                                 {0, 0, 0, 1}};
    const int row_parity = parity / 2, column_parity = parity % 2;
    double rows[kStemTaps][kStemSide] = {};  // g G^T
    for (int y = 0; 2 * y + row_parity < kStemKernel; ++y)
      for (int x = 0; 2 * x + column_parity < kStemKernel; ++x)
        for (int j = 0; j < kStemSide; ++j)
          rows[y][j] += kG[j][x] * static_cast<double>(
                                       kernel[((2 * y + row_parity) * kStemKernel + 2 * x + column_parity) * shape.c]);
    const int64_t block = k / kBlock<T>, lanes = vectors(block) * kLanes<T>;
    T* target = weights + block * block_elements() + k % kBlock<T>;
    for (int i = 0; i < kStemSide; ++i) {
      for (int j = 0; j < kStemSide; ++j) {
        const Chunks chunks = chunks_of(i * kStemSide + j);
        const int64_t term = (chunks.count == 2 ? row_parity : parity) * shape.c + c;
        double u = 0;
        for (int y = 0; y < kStemTaps; ++y) u += kG[i][y] * rows[y][j];
        if ((i < kStemTaps || row_parity == 0) && (j < kStemTaps || column_parity == 0))
          target[term * lanes] = static_cast<T>(u);
        target += chunks.count * chunks.length * lanes;
      }
    }
  }

  // Packs the convolution's input rows from `first` as [rows of both parities][packed_w][channels].
  void pack_parities(int64_t image, int64_t first, int64_t rows, T* target) const {
    const Tensor& input = call.input;
    memset(target, 0, static_cast<size_t>(rows * packed_w * channels) * sizeof(T));
    for (int64_t row = max_of(first, 0); row < min_of(first + 2 * rows, shape.h); ++row) {
      for (int parity = 0; parity < 2; ++parity) {
        const int64_t left = call.geometry.padding[1], skip = max_of(ceil_div(left - parity, 2), 0);
        const int64_t column = 2 * skip + parity - left, count = min_of(ceil_div(shape.w - column, 2), packed_w - skip);
        if (count <= 0) continue;
        pack(at(input, image * input.stride[0] + row * input.stride[2] + column * input.stride[3]), input.dtype, count,
             shape.c, 2 * input.stride[3], input.stride[1],
             target + ((row - first) / 2 * packed_w + skip) * channels + ((row - first) % 2 * 2 + parity) * shape.c,
             channels);
      }
    }
  }

  // `input`: the first patch's first pixel. target: [products][plane elements], each plane [tiles][channels].
  void transform_patches(const T* input, int64_t count, int64_t plane, T* target) const {
    for (int64_t i = 0; i < count * channels; i += kLanes<T>) {
      const T* patch = input + i / channels * 2 * channels + i % channels;
      Vec<T> d[kStemSide][kStemSide];
#pragma GCC unroll 5
      for (int x = 0; x < kStemSide; ++x) {
        Vec<T> line[kStemSide];
#pragma GCC unroll 5
        for (int y = 0; y < kStemSide; ++y) line[y] = load(patch + (y * packed_w + x) * channels);
        transform_stem_line(line);
#pragma GCC unroll 5
        for (int y = 0; y < kStemSide; ++y) d[y][x] = line[y];
      }
#pragma GCC unroll 5
      for (int y = 0; y < kStemSide; ++y) {
        transform_stem_line(d[y]);
#pragma GCC unroll 5
        for (int x = 0; x < kStemSide; ++x) store<T>(target + (y * kStemSide + x) * plane + i, d[y][x]);
      }
    }
  }

  template <int Vectors>
  FASTSEG_NOINLINE void multiply(const T* patches, int64_t patch_plane, int64_t count, int64_t block, T* products,
                                 int64_t product_plane) const {
    constexpr int kWidth = Vectors * kLanes<T>;
    const Vec<T> zero[Vectors] = {};
    const T* columns = weights + block * block_elements();
    for (int product = 0; product < kStemProducts; ++product) {
      const Chunks chunks = chunks_of(product);
      const Terms terms = {chunks.offsets, chunks.count, chunks.length};
      for (int64_t tile = 0; tile < count; tile += kPixels<Vectors>)
        multiply_tile<T, Vectors>(patches + product * patch_plane + tile * channels, channels, terms, columns, zero,
                                  products + product * product_plane + tile * kWidth);
      columns += chunks.count * chunks.length * kWidth;
    }
  }

  // A^T m A + bias: two rows of the convolution, [columns][block].
  void finish_tiles(const T* products, int64_t plane, int64_t count, int64_t block, T* upper, T* lower) const {
    const int64_t lanes = vectors(block) * kLanes<T>;
    for (int64_t i = 0; i < count * lanes; i += kLanes<T>) {
      Vec<T> sums[2][kStemSide];
#pragma GCC unroll 5
      for (int x = 0; x < kStemSide; ++x) {
        Vec<T> m[kStemSide];
#pragma GCC unroll 5
        for (int y = 0; y < kStemSide; ++y) m[y] = load(products + (y * kStemSide + x) * plane + i);
        sums[0][x] = m[0] + (m[1] + m[2]) + m[3];
        sums[1][x] = (m[1] - m[2]) + 2 * m[3] + m[4];
      }
      const Vec<T> shift = load(bias + block * kBlock<T> + i % lanes);
      const int64_t offset = i / lanes * 2 * lanes + i % lanes;
#pragma GCC unroll 2
      for (int y = 0; y < 2; ++y) {
        const Vec<T>(&m)[kStemSide] = sums[y];
        T* target = (y == 0 ? upper : lower) + offset;
        store<T>(target, m[0] + (m[1] + m[2]) + m[3] + shift);
        store<T>(target + lanes, (m[1] - m[2]) + 2 * m[3] + m[4] + shift);
      }
    }
  }

  bool run(int64_t task) const {
    const ConvPoolGeometry& g = call.geometry;
    const int64_t image = task / bands, top = task % bands * band, bottom = min_of(top + band, shape.pooled_h);
    const int64_t first = max_of(top - 1, 0);  // row of tiles
    const int64_t packed_rows = 2 * (bottom - first) + kStemTaps - 1;
    const int64_t input_elements = packed_rows * packed_w * channels, row_elements = 2 * tiles * kBlock<T>;
    const int64_t chunk = round_up(ceil_div(tiles, ceil_div(tiles, kChunk)), kWidestTile);
    const int64_t patch_plane = chunk * channels + kRowPadding, product_plane = chunk * kBlock<T> + kRowPadding;
    const int64_t convolved_elements = blocks * kStemRows * row_elements, pooled_elements = shape.pooled_w * kBlock<T>;
    const int64_t elements =
        input_elements + kStemProducts * (patch_plane + product_plane) + convolved_elements + 2 * pooled_elements;
    T* input = static_cast<T*>(scratch(elements * int64_t{sizeof(T)}));
    if (input == nullptr) return false;
    T* patches = input + input_elements;
    T* products = patches + kStemProducts * patch_plane;
    T* convolved = products + kStemProducts * product_plane;  // [blocks][row % kStemRows][columns][block]
    T* values = convolved + convolved_elements;
    Int<T>* positions = reinterpret_cast<Int<T>*>(values + pooled_elements);
    const auto row_of = [&](int64_t block, int64_t row) {
      return convolved + (block * kStemRows + row % kStemRows) * row_elements;
    };

    pack_parities(image, kStemRows * first - g.padding[0], packed_rows, input);
    if (!may_go_on(largest_magnitude(input, input_elements) <= largest_input, safe)) return true;
    for (int64_t row = first; row < bottom; ++row) {
      for (int64_t tile = 0; tile < tiles; tile += chunk) {
        const int64_t count = min_of(chunk, tiles - tile);
        transform_patches(input + ((row - first) * packed_w + tile) * 2 * channels, count, patch_plane, patches);
        for (int64_t block = 0; block < blocks; ++block) {
          const int64_t lanes = vectors(block) * kLanes<T>, column = 2 * tile * lanes;
          lanes == kBlock<T> ? multiply<2>(patches, patch_plane, count, block, products, product_plane)
                             : multiply<1>(patches, patch_plane, count, block, products, product_plane);
          finish_tiles(products, product_plane, count, block, row_of(block, 2 * row) + column,
                       row_of(block, 2 * row + 1) + column);
        }
      }
      for (int64_t block = 0; row >= top && block < blocks; ++block) {
        const int64_t lanes = vectors(block) * kLanes<T>;
        const Span span = window_span(g, 0, row, shape.convolved_h);
        const T* rows[3];
        for (int64_t y = span.begin; y < span.end; ++y) rows[y - span.begin] = row_of(block, y);
        pool_row(rows, span, row, shape.convolved_w, g, shape.pooled_w, lanes, values, positions);
        unpack_pooled(values, positions, lanes, image, block * kBlock<T>, min_of(lanes, shape.k - block * kBlock<T>),
                      row, call.output, call.positions);
      }
    }
    return true;
  }
};

}  // namespace
}  // namespace FASTSEG_ISA
}  // namespace fastseg

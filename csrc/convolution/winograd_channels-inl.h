// Winograd's F(2x2, 3x3) for many input channels, whose products are matrix products, windows x channels by channels x
// output channels. Also serves a skip beside the pool, and a pool of 1x1, which is none: then all of a window is
// stored.
#pragma once

#include "convolution/conv_relu_pool2d.h"
#include "convolution/kept_weights-inl.h"
#include "convolution/pool_tile-inl.h"
#include "convolution/register_tile-inl.h"
#include "convolution/winograd-inl.h"
#include "core/cache.h"
#include "core/parallel.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

// Transformed weights that don't stay are made for as many output channels at a time as take so many bytes (those of a
// deep layer take four times a second-level cache, and more memory than its input and output), but for so many channels
// at least: each pass transforms the input anew.
constexpr int64_t kPassBytes = 16 * 1024 * 1024;
constexpr int64_t kLeastPassChannels = 128;

template <class T>
struct WinogradChannels {
  const ConvReluPool2dWinogradForward& call;
  const ConvShape shape;
  const bool pools;    // the pool is 2x2, not 1x1
  const Tensor& full;  // the convolution's whole output, optional: the skip, or where nothing is pooled the output
  const int64_t windows_h, windows_w;
  const int64_t blocks;    // of output channels
  const int64_t channels;  // of the input, rounded up to whole vectors
  const int64_t packed_w;  // columns of a packed input row
  const int64_t band;      // rows of windows to a task
  const int64_t bands;     // of an image
  Span at_once = {};       // blocks whose weights are transformed: all of them, or a pass's
  int64_t groups = 0;      // tasks among which a band's blocks are divided
  T* weights = nullptr;    // [blocks at once][products][c][block], a plane to a product
  T* bias = nullptr;       // [blocks at once][block]
  T largest_input = 0;     // up to which nothing overflows
  bool* safe = nullptr;    // shared by all tasks

  explicit WinogradChannels(const ConvReluPool2dWinogradForward& c)
      : call(c),
        shape(c.input, c.weight, c.output, c.geometry),
        pools(c.geometry.pool_size[0] == kPoolSide),
        full(pools ? c.skip : c.output),
        windows_h(full ? ceil_div(shape.convolved_h, kPoolSide) : shape.pooled_h),
        windows_w(full ? ceil_div(shape.convolved_w, kPoolSide) : shape.pooled_w),
        blocks(ceil_div(shape.k, kBlock<T>)),
        channels(round_up(shape.c, kLanes<T>)),
        packed_w(patches_width(windows_w)),
        band(choose_band()),
        bands(ceil_div(windows_h, band)) {}

  int64_t choose_band() const {
    const int64_t row_bytes = packed_w * shape.c * int64_t{sizeof(T)};
    const int64_t rows = (kWinogradBandBytes / row_bytes - (kSide - kPoolSide)) / kPoolSide;
    return min_of(max_of(rows, ceil_div(kLeastWindows, windows_w)), windows_h);
  }

  int vectors(int64_t block) const { return vectors_of<T>(shape.k, block); }

  // One product's weights of a block of channels.
  int64_t weight_plane() const { return shape.c * kBlock<T> + kRowPadding; }

  int64_t block_elements() const { return kProducts * weight_plane(); }

  // Of some blocks, for an input of `c` channels.
  static int64_t workspace_elements(int64_t c, int64_t count) {
    return count * (kProducts * (c * kBlock<T> + kRowPadding) + kBlock<T> + 2);
  }

  // Blocks to a pass, evenly divided, where what is made of the weights doesn't stay.
  int64_t pass_blocks() const {
    const int64_t least = min_of(ceil_div(kLeastPassChannels, kBlock<T>), blocks);
    const int64_t most = max_of(kPassBytes / (block_elements() * int64_t{sizeof(T)}), least);
    return ceil_div(blocks, ceil_div(blocks, most));
  }

  const T* weights_of(int64_t block) const { return weights + (block - at_once.begin) * block_elements(); }
  const T* bias_of(int64_t block) const { return bias + (block - at_once.begin) * kBlock<T>; }

  // The largest magnitudes of each block's weights, then of its bias.
  T* maxima() const { return bias + at_once.size() * kBlock<T>; }

  // Of the block at `place` of those at once.
  bool transform_weights(int64_t place) const {
    const int64_t block = at_once.begin + place;
    const int64_t lanes = vectors(block) * kLanes<T>, first = block * kBlock<T>, count = min_of(shape.k - first, lanes);
    const int64_t elements = kKernelTaps * shape.c * lanes;
    T* taps = static_cast<T*>(scratch(elements * int64_t{sizeof(T)}));  // [a kernel's elements][lanes]
    if (taps == nullptr) return false;
    memset(taps, 0, static_cast<size_t>(elements) * sizeof(T));
    T* shift = bias + place * kBlock<T>;
    memset(shift, 0, kBlock<T> * sizeof(T));
    if (call.bias)
      pack(at(call.bias, first * call.bias.stride[0]), call.bias.dtype, 1, count, 0, call.bias.stride[0], shift, 0);
    const KernelStrides step = pack_kernels(first, count, lanes, taps);
    if (call.scale) scale_kernels(first, count, lanes, elements, taps);
    maxima()[place] = largest_magnitude(taps, elements);
    maxima()[at_once.size() + place] = largest_magnitude(shift, kBlock<T>);
    for (int64_t i = 0; i < shape.c * lanes; i += kLanes<T>) {
      Vec<T> g[kKernelTaps], u[kSide][kSide];
      for (int64_t tap = 0; tap < kKernelTaps; ++tap) {
        const int64_t row = tap / kKernelSide, column = tap % kKernelSide;
        g[tap] = load(taps + (i / lanes * step.c + row * step.row + column * step.column) * lanes + i % lanes);
      }
      transform_kernel(g, u);
      T* target = weights + place * block_elements() + i;
      for (int product = 0; product < kProducts; ++product)
        store<T>(target + product * weight_plane(), u[product / kSide][product % kSide]);
    }
    return true;
  }

  void scale_kernels(int64_t first, int64_t count, int64_t lanes, int64_t elements, T* taps) const {
    T scale[kBlock<T>] = {};
    pack(at(call.scale, first * call.scale.stride[0]), call.scale.dtype, 1, count, 0, call.scale.stride[0], scale, 0);
    for (int64_t i = 0; i < elements; i += kLanes<T>) store<T>(taps + i, load(taps + i) * load(scale + i % lanes));
  }

  struct KernelStrides {
    int64_t c, row, column;
  };

  // Packs the kernels of `count` output channels as [a kernel's elements][lanes]. Dense kernels keep the order in which
  // they lie in memory.
  KernelStrides pack_kernels(int64_t first, int64_t count, int64_t lanes, T* taps) const {
    const Tensor& weight = call.weight;
    const KernelStrides given = {weight.stride[1], weight.stride[2], weight.stride[3]};
    const KernelStrides nchw = {kKernelTaps, kKernelSide, 1}, nhwc = {1, kKernelSide * shape.c, shape.c};
    const auto same = [&](const KernelStrides& other) {
      return given.c == other.c && given.row == other.row && given.column == other.column;
    };
    if (same(nchw) || same(nhwc)) {
      pack(at(weight, first * weight.stride[0]), weight.dtype, kKernelTaps * shape.c, count, 1, weight.stride[0], taps,
           lanes);
      return given;
    }
    for (int64_t c = 0; c < shape.c; ++c)
      for (int64_t row = 0; row < kKernelSide; ++row)
        pack(at(weight, first * weight.stride[0] + c * weight.stride[1] + row * weight.stride[2]), weight.dtype,
             kKernelSide, count, weight.stride[3], weight.stride[0], taps + (row * nhwc.row + c) * lanes,
             shape.c * lanes);
    return nhwc;
  }

  // The products of all windows with one block of weights: [products][plane elements], each plane [windows][block].
  template <int Vectors>
  FASTSEG_NOINLINE void multiply(const T* patches, int64_t patch_plane, int64_t windows, int64_t block, T* products,
                                 int64_t product_plane) const {
    const Vec<T> zero[Vectors] = {};
    const int64_t begin = 0;
    const Terms terms = {&begin, 1, shape.c};
    for (int64_t product = 0; product < kProducts; ++product) {
      const T* columns = weights_of(block) + product * weight_plane();
      for (int64_t window = 0; window < windows; window += kPixels<Vectors>)
        multiply_tile<T, Vectors>(patches + product * patch_plane + window * channels, channels, terms, columns, zero,
                                  products + product * product_plane + window * Vectors * kLanes<T>);
    }
  }

  // What leaves the registers, for the windows in work together.
  struct Results {
    int64_t columns;                    // of `full`: two for each window
    T *pooled, *full;                   // [windows][block], [2][columns][block]
    Int<T>*positions, *full_positions;  // the same
  };

  // Of windows [first, first + count) of the band that begins at `top`.
  void finish_products(const T* products, int64_t plane, int64_t block, int64_t top, int64_t first, int64_t count,
                       const Results& results) const {
    const int64_t lanes = vectors(block) * kLanes<T>;
    int64_t row = first / windows_w, column = first % windows_w;
    for (int64_t window = 0; window < count; ++window) {
      const bool cut_row = kPoolSide * (top + row + 1) > shape.convolved_h;
      const bool cut_column = kPoolSide * (column + 1) > shape.convolved_w;
      const Clip<T> clip = {cut_row || cut_column, cut_row, -Int<T>{cut_column} - IntVec<T>{}};
      for (int64_t lane = 0; lane < lanes; lane += kLanes<T>) {
        const T* product = products + window * lanes + lane;
        const auto column_of = [&](int x, Vec<T>(&m)[kSide]) {
#pragma GCC unroll 4
          for (int y = 0; y < kSide; ++y) m[y] = load(product + (y * kSide + x) * plane);
        };
        Window<Vec<T>> sums;
        Vec<T> m[kSide];
        column_of(0, m), sums.template add<0>(m);
        column_of(1, m), sums.template add<1>(m);
        column_of(2, m), sums.template add<2>(m);
        column_of(3, m), sums.template add<3>(m);
        const Vec<T> shift = load(bias_of(block) + lane);
        if (pools)
          pool_window(sums, shift, clip, results.pooled + window * lanes + lane,
                      results.positions + window * lanes + lane);
        if (full) store_window(sums, shift, results, window, lanes, lane);
      }
      if (++column == windows_w) column = 0, ++row;
    }
  }

  // relu(window + bias), or window + bias itself, and the positions under a pool of 1x1.
  void store_window(const Window<Vec<T>>& sums, Vec<T> shift, const Results& results, int64_t window, int64_t lanes,
                    int64_t lane) const {
    for (int y = 0; y < kPoolSide; ++y)
      for (int x = 0; x < kPoolSide; ++x) {
        const Vec<T> value = sums.values[y][x] + shift;
        const IntVec<T> passes = call.relu ? value > Vec<T>{} : ~IntVec<T>{};
        const int64_t at = (y * results.columns + kPoolSide * window + x) * lanes + lane;
        store<T>(results.full + at, passes ? value : Vec<T>{});
        const IntVec<T> where = ~passes & (kCut - IntVec<T>{});
        memcpy(results.full_positions + at, &where, sizeof where);
      }
  }

  bool run(int64_t task) const {
    const int64_t group = task % groups, image = task / groups / bands, top = task / groups % bands * band;
    const Span group_blocks = {at_once.begin + group * at_once.size() / groups,
                               at_once.begin + (group + 1) * at_once.size() / groups};
    const int64_t window_rows = min_of(band, windows_h - top), windows = window_rows * windows_w;
    const Span rows = {kPoolSide * top - call.geometry.padding[0],
                       kPoolSide * (top + window_rows - 1) - call.geometry.padding[0] + kSide};
    const int64_t input_elements = round_up(rows.size() * packed_w * shape.c, kLanes<T>) + kLanes<T>;

    // As many windows at a time as fit the cache, evenly divided, in whole tiles of registers.
    const int64_t fitting = kWinogradPatchBytes / (kProducts * channels * int64_t{sizeof(T)});
    const int64_t chunks = ceil_div(windows, min_of(max_of(fitting, kLeastWindows), kMostWindows));
    const int64_t chunk = round_up(ceil_div(windows, chunks), kWidestTile);
    const int64_t patch_plane = chunk * channels + kRowPadding, product_plane = chunk * kBlock<T> + kRowPadding;

    const int64_t pooled = chunk * kBlock<T>, whole = full ? kPoolSide * kPoolSide * pooled : 0;
    const int64_t passed_row = call.passed ? packed_w * shape.c : 0;
    const int64_t elements =
        input_elements + kProducts * (patch_plane + product_plane) + 2 * (pooled + whole) + passed_row;
    T* input = static_cast<T*>(scratch(elements * int64_t{sizeof(T)}));
    if (input == nullptr) return false;
    T* patches = input + input_elements;
    T* products = patches + kProducts * patch_plane;
    T* values = products + kProducts * product_plane;
    Int<T>* positions = reinterpret_cast<Int<T>*>(values + pooled + whole);
    const Results results = {kPoolSide * chunk, values, values + pooled, positions, positions + pooled};

    memset(input + input_elements - 2 * kLanes<T>, 0, 2 * kLanes<T> * sizeof(T));
    pack_passed(call.input, call.passed, call.geometry.padding[1], image, rows, packed_w, input + elements - passed_row,
                input);
    if (!may_go_on(largest_magnitude(input, input_elements) <= largest_input, safe)) return true;
    for (int64_t first = 0; first < windows; first += chunk) {
      const int64_t count = min_of(chunk, windows - first);
      transform_patches(input, shape.c, windows_w, {first, first + count}, patch_plane, patches);
      for (int64_t block = group_blocks.begin; block < group_blocks.end; ++block) {
        vectors(block) == 2 ? multiply<2>(patches, patch_plane, count, block, products, product_plane)
                            : multiply<1>(patches, patch_plane, count, block, products, product_plane);
        finish_products(products, product_plane, block, top, first, count, results);
        write(results, image, block, top, first, count);
      }
    }
    return true;
  }

  void write(const Results& results, int64_t image, int64_t block, int64_t top, int64_t first, int64_t count) const {
    const int64_t lanes = vectors(block) * kLanes<T>, channel = block * kBlock<T>;
    const int64_t channel_count = min_of(lanes, shape.k - channel);
    for (int64_t done = 0, next; done < count; done = next) {
      const int64_t row = top + (first + done) / windows_w, column = (first + done) % windows_w;
      next = min_of(done + windows_w - column, count);
      const Span columns = {column, min_of(column + next - done, shape.pooled_w)};
      if (pools && row < shape.pooled_h && columns.size() > 0)
        unpack_pooled(results.pooled + done * lanes, results.positions + done * lanes, lanes, image, channel,
                      channel_count, row, part_of(call.output, 3, columns), part_of(call.positions, 3, columns));
      if (!full) continue;
      const Span whole = {kPoolSide * column, min_of(kPoolSide * (column + next - done), shape.convolved_w)};
      for (int64_t y = 0; y < kPoolSide && kPoolSide * row + y < shape.convolved_h; ++y) {
        const int64_t at = (y * results.columns + kPoolSide * done) * lanes;
        unpack_pooled(results.full + at, results.full_positions + at, lanes, image, channel, channel_count,
                      kPoolSide * row + y, part_of(full, 3, whole),
                      part_of(pools ? Tensor{} : call.positions, 3, whole));
      }
    }
  }

  bool empty() const { return shape.n * bands * blocks == 0; }

  // Of `some` blocks; tasks() are those of these blocks then.
  void prepare(void* workspace, Span some, bool transformed = false) {
    at_once = some;
    weights = static_cast<T*>(workspace);
    bias = weights + some.size() * block_elements();
    // No sum depends on it: each block is computed by itself.
    const int64_t wanted = max_of(kTasksWanted * some.size() / blocks, int64_t{call.threads});
    groups = min_of(some.size(), ceil_div(wanted, shape.n * bands));
    if (!transformed) for_each_task(some.size(), call.threads, [&](int64_t place) { return transform_weights(place); });
    largest_input = largest_safe_input(maxima(), 2 * some.size(), kGrowth * shape.c);
  }

  int64_t tasks() const { return shape.n * bands * groups; }
};

}  // namespace
}  // namespace FASTSEG_ISA
}  // namespace fastseg

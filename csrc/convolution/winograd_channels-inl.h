// Winograd's F(2x2, 3x3) for many input channels, whose products are matrix products, windows x channels by channels x
// output channels. Also serves a skip beside the pool, and a pool of 1x1, which is none: then all of a window is
// stored.
#pragma once

#include "convolution/conv_relu_pool2d.h"
#include "convolution/pool_tile-inl.h"
#include "convolution/register_tile-inl.h"
#include "convolution/winograd-inl.h"
#include "convolution/winograd_kernels-inl.h"
#include "core/cache.h"
#include "core/parallel.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

constexpr int64_t kDeepTasksWanted = 4;  // each transforms its input anew

// A dilated convolution is one of its own for every remainder of rows and columns by the dilation: input and output of
// the one that begins there.
inline ConvReluPool2dWinogradForward phase_of(const ConvReluPool2dWinogradForward& call, int64_t row, int64_t column) {
  ConvReluPool2dWinogradForward phase = call;
  const int64_t first[2] = {row, column};
  for (int i = 0; i < 2; ++i) {
    const int64_t step = call.geometry.dilation[i];
    Tensor* const tensors[] = {&phase.input, &phase.output, &phase.positions};
    for (Tensor* tensor : tensors) {
      if (!*tensor) continue;
      tensor->size[2 + i] = ceil_div(tensor->size[2 + i] - first[i], step);
      tensor->data = at_mutable(*tensor, first[i] * tensor->stride[2 + i]);
      tensor->stride[2 + i] *= step;
    }
    phase.geometry.padding[i] /= step;
    phase.geometry.dilation[i] = 1;
  }
  return phase;
}

template <class T>
struct WinogradChannels {
  const ConvReluPool2dWinogradForward& whole;
  const int64_t phases_h, phases_w;          // of an image that have any output
  const ConvReluPool2dWinogradForward call;  // of the first phase, the largest one
  const ConvShape shape;
  const bool pools;    // the pool is 2x2, not 1x1
  const Tensor& full;  // the convolution's whole output, optional: the skip, or where nothing is pooled the output
  const int64_t windows_h, windows_w;
  WinogradKernels<T> kernels;
  const bool deep;         // the patches of few windows take more than the caches
  const int64_t slice;     // input channels at a time: all of them, or in deep layers a part, in whole vectors
  const int64_t packed_w;  // columns of a packed input row
  const int64_t maps;      // phases of all images
  const int64_t band;      // rows of windows to a task
  const int64_t bands;     // of a map
  const int64_t batch;     // maps to a task, where each has few windows: they are multiplied together
  int64_t groups = 0;      // tasks among which a band's blocks are divided
  bool* safe = nullptr;    // shared by all tasks

  explicit WinogradChannels(const ConvReluPool2dWinogradForward& c)
      : whole(c),
        phases_h(max_of(min_of(c.geometry.dilation[0], c.output.size[2]), 1)),
        phases_w(max_of(min_of(c.geometry.dilation[1], c.output.size[3]), 1)),
        call(phase_of(c, 0, 0)),
        shape(call.input, call.weight, call.output, call.geometry),
        pools(call.geometry.pool_size[0] == kPoolSide),
        full(full_of(call)),
        windows_h(full ? ceil_div(shape.convolved_h, kPoolSide) : shape.pooled_h),
        windows_w(full ? ceil_div(shape.convolved_w, kPoolSide) : shape.pooled_w),
        kernels(whole),
        deep(!patches_fit<T>(shape.c)),
        slice(deep ? choose_slice() : shape.c),
        packed_w(patches_width(windows_w)),
        maps(shape.n * phases_h * phases_w),
        band(choose_band()),
        bands(ceil_div(windows_h, band)),
        batch(bands > 1 || windows_h * windows_w >= (deep ? kMostWindows : kLeastWindows)
                  ? 1
                  : kMostWindows / (windows_h * windows_w)) {}

  int64_t choose_slice() const {
    const int64_t fitting = kWinogradPlaneBytes / (kMostWindows * int64_t{sizeof(T)});
    return min_of(round_up(ceil_div(shape.c, ceil_div(shape.c, fitting)), kLanes<T>), shape.c);
  }

  // Deep layers' are as large as their windows in work together.
  int64_t choose_band() const {
    if (deep) return ceil_div(windows_h, ceil_div(windows_h, max_of(kMostWindows / windows_w, 1)));
    const int64_t row_bytes = packed_w * shape.c * int64_t{sizeof(T)};
    const int64_t rows = (kWinogradBandBytes / row_bytes - (kSide - kPoolSide)) / kPoolSide;
    return min_of(max_of(rows, ceil_div(kLeastWindows, windows_w)), windows_h);
  }

  // One product of all windows, of `count` channels, with one block of weights, [windows][block]. Adds: to the sums of
  // the channels before them. Fetches: meanwhile as many weights from `next` on come to the cache.
  template <int Vectors, bool Adds, bool Fetches>
  FASTSEG_NOINLINE void multiply(const T* patches, int64_t count, int64_t windows, const T* columns, const T* next,
                                 T* products) const {
    const Vec<T> zero[Vectors] = {};
    const int64_t begin = 0, step = round_up(count, kLanes<T>);
    const Terms terms = {&begin, 1, count};
    const int64_t share = ceil_div(count * Vectors * kLanes<T>, ceil_div(windows, kPixels<Vectors>));
    for (int64_t window = 0; window < windows; window += kPixels<Vectors>) {
      if (Fetches)
        for (const T* end = next + share; next < end; next += kLine<T>) __builtin_prefetch(next, 0, 2);
      multiply_tile<T, Vectors, Adds>(patches + window * step, step, terms, columns, zero,
                                      products + window * Vectors * kLanes<T>);
    }
  }

  template <int Vectors>
  auto multiply_of(bool adds) const {
    if (deep)
      return adds ? &WinogradChannels::multiply<Vectors, true, true>
                  : &WinogradChannels::multiply<Vectors, false, true>;
    return &WinogradChannels::multiply<Vectors, false, false>;
  }

  // The products of all windows, of a span of channels, with some blocks of weights: [blocks][products][plane
  // elements]. A product's patches stay in the cache for all of the blocks, whose weights come but once: in deep layers
  // from memory, in pieces that lie too far apart for the hardware to foresee the next.
  void multiply_blocks(const T* patches, int64_t patch_plane, Span of, int64_t windows, Span some, T* products,
                       int64_t product_plane) const {
    const bool adds = of.begin > 0;
    const auto columns_of = [&](int64_t product, int64_t block) {
      return kernels.weights_of(block) + product * kernels.weight_plane() +
             of.begin * kernels.vectors(block) * kLanes<T>;
    };
    for (int64_t product = 0; product < kProducts; ++product)
      for (int64_t block = some.begin; block < some.end; ++block) {
        const bool last = block + 1 == some.end;
        const T* next = columns_of(last ? product + 1 : product, last ? some.begin : block + 1);
        T* target = products + ((block - some.begin) * kProducts + product) * product_plane;
        const auto multiply = kernels.vectors(block) == 1 ? multiply_of<1>(adds) : multiply_of<2>(adds);
        (this->*multiply)(patches + product * patch_plane, of.size(), windows, columns_of(product, block), next,
                          target);
      }
  }

  // What leaves the registers, for the windows in work together.
  struct Results {
    int64_t columns;                    // of `full`: two for each window
    T *pooled, *full;                   // [windows][block], [2][columns][block]
    Int<T>*positions, *full_positions;  // the same
  };

  // Windows of one map among those of a task that are in work together.
  struct Part {
    int64_t map;
    Span windows;   // of the map's band
    int64_t place;  // of the first of them among those in work
  };

  // Of a part of the windows of bands that begin at `top`.
  void finish_products(const ConvReluPool2dWinogradForward& phase, const T* products, int64_t plane, int64_t block,
                       int64_t top, const Part& part, const Results& results) const {
    const int64_t lanes = kernels.vectors(block) * kLanes<T>, end = part.place + part.windows.size();
    int64_t row = part.windows.begin / windows_w, column = part.windows.begin % windows_w;
    const Tensor& all = full_of(phase);
    const bool through = writes_through(block);
    T* const output =
        through ? static_cast<T*>(at_mutable(all, image_of(part.map) * all.stride[0] + block * kBlock<T>)) : nullptr;
    for (int64_t window = part.place; window < end; ++window) {
      const bool cut_row = kPoolSide * (top + row + 1) > shape.convolved_h;
      const bool cut_column = kPoolSide * (column + 1) > shape.convolved_w;
      const Clip<T> clip = {cut_row || cut_column, cut_row, -Int<T>{cut_column} - IntVec<T>{}};
      for (int64_t lane = 0; lane < lanes; lane += kLanes<T>) {
        const T* product = products + window * lanes + lane;
        const Window<Vec<T>> sums = window_of(product, plane);
        const Vec<T> shift = load(kernels.bias_of(block) + lane);
        if (pools)
          pool_window(sums, shift, clip, results.pooled + window * lanes + lane,
                      results.positions + window * lanes + lane);
        if (through) {
          const int64_t first_row = kPoolSide * (top + row), first_column = kPoolSide * column;
          store_window(sums, shift, all.size[2] - first_row, all.size[3] - first_column,
                       output + first_row * all.stride[2] + first_column * all.stride[3] + lane, nullptr, all.stride[2],
                       all.stride[3]);
        } else if (full) {
          const int64_t place = kPoolSide * window * lanes + lane;
          store_window(sums, shift, kPoolSide, kPoolSide, results.full + place,
                       call.positions && !pools ? results.full_positions + place : nullptr, results.columns * lanes,
                       lanes);
        }
      }
      if (++column == windows_w) column = 0, ++row;
    }
  }

  // Of the first `rows` and `columns` of a window, relu(window + bias), or window + bias itself, and the positions
  // under a pool of 1x1, optional.
  FASTSEG_INLINE void store_window(const Window<Vec<T>>& sums, Vec<T> shift, int64_t rows, int64_t columns, T* values,
                                   Int<T>* positions, int64_t row_step, int64_t column_step) const {
#pragma GCC unroll 2
    for (int y = 0; y < kPoolSide; ++y)
#pragma GCC unroll 2
      for (int x = 0; x < kPoolSide; ++x) {
        if (y >= rows || x >= columns) continue;
        const Vec<T> value = sums.values[y][x] + shift;
        const IntVec<T> passes = call.relu ? value > Vec<T>{} : ~IntVec<T>{};
        const int64_t at = y * row_step + x * column_step;
        store<T>(values + at, passes ? value : Vec<T>{});
        if (positions == nullptr) continue;
        const IntVec<T> where = ~passes & (kCut - IntVec<T>{});
        memcpy(positions + at, &where, sizeof where);
      }
  }

  // Whether whole vectors of a block's channels lie in memory as they leave the registers.
  bool writes_through(int64_t block) const {
    const bool whole_vectors = kernels.vectors(block) * kLanes<T> <= shape.k - block * kBlock<T>;
    return full && full.dtype == kDType<T> && full.stride[1] == 1 && whole_vectors && (pools || !call.positions);
  }

  // `body` for each map's part of the windows [first, first + count) of a task, of which each map has `of_map`.
  template <class Body>
  static void for_each_part(int64_t map, int64_t of_map, int64_t first, int64_t count, const Body& body) {
    for (int64_t done = 0, next; done < count; done = next) {
      const int64_t begin = (first + done) % of_map;
      next = min_of(done + of_map - begin, count);
      body(Part{map + (first + done) / of_map, {begin, begin + next - done}, done});
    }
  }

  ConvReluPool2dWinogradForward of_map(int64_t map) const {
    const int64_t phase = map % (phases_h * phases_w);
    return phase_of(whole, phase / phases_w, phase % phases_w);
  }

  int64_t image_of(int64_t map) const { return map / (phases_h * phases_w); }

  // What isn't pooled.
  const Tensor& full_of(const ConvReluPool2dWinogradForward& phase) const { return pools ? phase.skip : phase.output; }

  // Packs a span of a map's channels: the rows and columns that windows side by side read.
  void pack_slice(int64_t map, Span of, Span rows, Span across, T* buffer, T* target) const {
    const int64_t left = call.geometry.padding[1] - kPoolSide * across.begin, first = max_of(-left, 0);
    const auto part = [&](const Tensor& tensor) {
      return part_of(part_of(tensor, 1, of), 3, {first, max_of(tensor.size[3], first)});
    };
    pack_passed(part(of_map(map).input), part(call.passed), max_of(left, 0), image_of(map), rows,
                patches_width(across.size()), buffer, target);
  }

  bool run(int64_t task) const {
    const int64_t group = task % groups, unit = task / groups;
    const int64_t map = unit / bands * batch, top = unit % bands * band;
    const Span group_blocks = {kernels.at_once.begin + group * kernels.at_once.size() / groups,
                               kernels.at_once.begin + (group + 1) * kernels.at_once.size() / groups};
    const int64_t window_rows = min_of(band, windows_h - top), of_one = window_rows * windows_w;
    const int64_t windows = of_one * min_of(batch, maps - map);
    const Span rows = {kPoolSide * top - call.geometry.padding[0],
                       kPoolSide * (top + window_rows - 1) - call.geometry.padding[0] + kSide};
    // As many windows at a time as fit the cache, evenly divided, in whole tiles of registers: with all their products
    // for one block of weights after the other, or, in deep layers, with one product of a slice of the channels for
    // all of the task's blocks.
    const int64_t patch = round_up(slice, kLanes<T>);
    const int64_t fitting = deep ? kMostWindows : kWinogradPatchBytes / (kProducts * patch * int64_t{sizeof(T)});
    const int64_t chunks = ceil_div(windows, min_of(max_of(fitting, kLeastWindows), kMostWindows));
    const int64_t chunk = round_up(ceil_div(windows, chunks), kWidestTile);
    const int64_t patch_plane = chunk * patch + kRowPadding, product_plane = chunk * kBlock<T> + kRowPadding;
    const int64_t block_products = kProducts * product_plane;
    // Deep layers pack a slice for each chunk anew: of a row of more windows than that, the chunk's columns alone.
    const bool in_pieces = deep && chunk < windows_w;
    const int64_t width = in_pieces ? patches_width(chunk) : packed_w;
    const int64_t input_elements = round_up(rows.size() * width * slice, kLanes<T>) + kLanes<T>;
    const int64_t together = deep ? group_blocks.size() : 1;

    const int64_t pooled = chunk * kBlock<T>, whole_window = full ? kPoolSide * kPoolSide * pooled : 0;
    const int64_t passed_row = call.passed ? width * slice : 0;
    const int64_t elements =
        input_elements + kProducts * patch_plane + together * block_products + 2 * (pooled + whole_window) + passed_row;
    T* input = static_cast<T*>(scratch(elements * int64_t{sizeof(T)}));
    if (input == nullptr) return false;
    T* patches = input + input_elements;
    T* products = patches + kProducts * patch_plane;
    T* values = products + together * block_products;
    Int<T>* positions = reinterpret_cast<Int<T>*>(values + pooled + whole_window);
    const Results results = {kPoolSide * chunk, values, values + pooled, positions, positions + pooled};

    memset(input + input_elements - 2 * kLanes<T>, 0, 2 * kLanes<T> * sizeof(T));
    int64_t packed_map = -1, packed_channel = -1;
    for (int64_t first = 0; first < windows; first += chunk) {
      const int64_t count = min_of(chunk, windows - first);
      for (int64_t begin = group_blocks.begin; begin < group_blocks.end; begin += together) {
        const Span some = {begin, min_of(begin + together, group_blocks.end)};
        for (int64_t channel = 0; channel < shape.c; channel += slice) {
          const Span of = {channel, min_of(channel + slice, shape.c)};
          bool goes_on = true;
          const auto transform = [&](const Part& part) {
            const Span across = in_pieces ? part.windows : Span{0, windows_w};
            if (in_pieces || part.map != packed_map || channel != packed_channel) {
              packed_map = part.map, packed_channel = channel;
              pack_slice(part.map, of, rows, across, input + elements - passed_row, input);
              goes_on = goes_on && may_go_on(largest_magnitude(input, input_elements) <= kernels.largest_input, safe);
            }
            const Span place = {part.windows.begin - across.begin, part.windows.end - across.begin};
            T* target = patches + part.place * round_up(of.size(), kLanes<T>);
            if (goes_on) transform_patches(input, of.size(), across.size(), place, patch_plane, target);
          };
          if (deep || begin == group_blocks.begin) for_each_part(map, of_one, first, count, transform);
          if (!goes_on) return true;
          multiply_blocks(patches, patch_plane, of, count, some, products, product_plane);
        }
        for (int64_t block = begin; block < some.end; ++block)
          for_each_part(map, of_one, first, count, [&](const Part& part) {
            const ConvReluPool2dWinogradForward phase = of_map(part.map);
            finish_products(phase, products + (block - begin) * block_products, product_plane, block, top, part,
                            results);
            write(phase, results, block, top, part);
          });
      }
    }
    return true;
  }

  void write(const ConvReluPool2dWinogradForward& phase, const Results& results, int64_t block, int64_t top,
             const Part& part) const {
    const bool packed = full && !writes_through(block);
    if (!pools && !packed) return;
    const int64_t image = image_of(part.map);
    const Tensor& all = full_of(phase);
    const int64_t lanes = kernels.vectors(block) * kLanes<T>, channel = block * kBlock<T>;
    const int64_t channel_count = min_of(lanes, shape.k - channel);
    for (int64_t window = part.windows.begin, next; window < part.windows.end; window = next) {
      const int64_t row = top + window / windows_w, column = window % windows_w;
      next = min_of(window + windows_w - column, part.windows.end);
      const int64_t place = part.place + window - part.windows.begin;
      const Span columns = {column, min_of(column + next - window, shape.pooled_w)};
      if (pools && row < shape.pooled_h && columns.size() > 0)
        unpack_pooled(results.pooled + place * lanes, results.positions + place * lanes, lanes, image, channel,
                      channel_count, row, part_of(phase.output, 3, columns), part_of(phase.positions, 3, columns));
      if (!packed) continue;
      const Span wide = {kPoolSide * column, min_of(kPoolSide * (column + next - window), all.size[3])};
      for (int64_t y = 0; y < kPoolSide && kPoolSide * row + y < all.size[2] && wide.size() > 0; ++y) {
        const int64_t at = (y * results.columns + kPoolSide * place) * lanes;
        unpack_pooled(results.full + at, results.full_positions + at, lanes, image, channel, channel_count,
                      kPoolSide * row + y, part_of(all, 3, wide), part_of(pools ? Tensor{} : phase.positions, 3, wide));
      }
    }
  }

  bool empty() const { return maps * bands * kernels.blocks == 0; }

  // Of `some` blocks; tasks() are those of these blocks then.
  void prepare(void* workspace, Span some, bool transformed = false) {
    kernels.prepare(workspace, some, transformed);
    // No sum depends on it: each block is computed by itself.
    const int64_t wanted =
        max_of((deep ? kDeepTasksWanted : kTasksWanted) * some.size() / kernels.blocks, int64_t{call.threads});
    const int64_t most = kWinogradProductsBytes / (kProducts * kMostWindows * kBlock<T> * int64_t{sizeof(T)});
    groups = min_of(some.size(), max_of(ceil_div(wanted, units()), deep ? ceil_div(some.size(), most) : 1));
  }

  // Of windows that are multiplied with the same weights.
  int64_t units() const { return ceil_div(maps, batch) * bands; }

  int64_t tasks() const { return units() * groups; }
};

}  // namespace
}  // namespace FASTSEG_ISA
}  // namespace fastseg

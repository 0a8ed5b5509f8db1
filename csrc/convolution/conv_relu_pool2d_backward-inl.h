// What the two halves of conv_relu_pool2d's backward share.
//
// Both are sums over lists: in a list of (gradient, index) pairs, each pair adds its gradient times a run of numbers.
//
//   grad_weight: a list for each output channel, of the windows that carry its gradient; the runs are patches of input
//   grad_input:  a list for each position in a window, of the channels whose maximum is there; the runs are kernels
//
// A patch is cut into chunks that are contiguous in memory and short enough for the registers, and the loops go over
// chunks first: what the lists of a tile of windows point to, one chunk wide, stays in the first-level cache.
#pragma once

#include "convolution/conv_relu_pool2d.h"
#include "convolution/conv_tile-inl.h"
#include "core/parallel.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

// Vectors that are summed in registers: with the gradient's broadcast and an operand they fit in 16.
constexpr int kMostVectors = 12;
// A convolution whose patch rows are shorter than this many vectors folds its kernel rows into the channels: its chunks
// would be too short to pay for a list's entry.
constexpr int64_t kFoldedVectors = 4;
// Output channels that are worked on together: their kernels, one chunk wide, take 24 KB (AVX2). Half as many make the
// lists of grad_input too short: up to 13% slower (AMD Zen 3, 2026-11-22).
constexpr int64_t kGroup = 64;

// Rows of the input or of its gradient: [block][row][slot][feature of the block]. A feature is a channel, or, folded, a
// kernel row and channel. A slot holds a column; those that a dilated kernel reads together lie side by side.
struct PackedRows {
  int64_t features, block, slots, rows;

  int64_t blocks() const { return ceil_div(features, block); }
  int64_t length(int64_t b) const { return min_of(block, features - b * block); }
  int64_t begin(int64_t b) const { return b * block * slots * rows; }
  int64_t row(int64_t b, int64_t r) const { return begin(b) + r * slots * length(b); }
  int64_t elements() const { return features * slots * rows; }
};

// A chunk, or, where that is longer than the registers, a part of it; and where it lies.
struct Chunk {
  int64_t source;    // in packed rows, from the patch's first row
  int64_t features;  // of its block: the distance between neighbouring slots
  int64_t taps;      // in the packed taps of one kernel
  int vectors;
  int64_t last;  // elements of its last vector that count
};

// Lists of (gradient, index), and the number of the run that each list's sum is added to.
template <class T>
struct Lists {
  T* gradients;      // [lists][capacity]
  int32_t* indices;  // [lists][capacity]
  int32_t* counts;   // [lists]
  const int32_t* targets;
  int64_t lists, capacity;
};

// For every list: sums[its target] += gradient * values[index], over its entries. Of the last vector `last` elements
// are written: what follows belongs to other sums, to which infinity times a padding zero must not be added.
template <class T, int Vectors>
FASTSEG_NOINLINE void add_lists(const Lists<T>& lists, const T* values, int64_t value_step, T* sums, int64_t sum_step,
                                int64_t last) {
  constexpr bool kTwo = 2 * Vectors <= kMostVectors;  // few sums at once would wait for each other
  IntVec<T> lane;
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
  const IntVec<T> inside = lane < Int<T>(last);
  for (int64_t l = 0; l < lists.lists; ++l) {
    const T* gradient = lists.gradients + l * lists.capacity;
    const int32_t* index = lists.indices + l * lists.capacity;
    const T* const end = gradient + lists.counts[l];
    if (gradient == end) continue;
    Vec<T> even[Vectors] = {}, odd[Vectors] = {};
    if constexpr (kTwo) {
      for (; gradient + 1 < end; gradient += 2, index += 2) {
        const T *first = values + index[0] * value_step, *second = values + index[1] * value_step;
        const Vec<T> g0 = broadcast(gradient[0]), g1 = broadcast(gradient[1]);
#pragma GCC unroll 12
        for (int v = 0; v < Vectors; ++v) {
          even[v] += g0 * load(first + v * kLanes<T>);
          odd[v] += g1 * load(second + v * kLanes<T>);
        }
      }
    }
    for (; gradient < end; ++gradient, ++index) {
      const T* value = values + *index * value_step;
      const Vec<T> g = broadcast(*gradient);
#pragma GCC unroll 12
      for (int v = 0; v < Vectors; ++v) even[v] += g * load(value + v * kLanes<T>);
    }
    T* sum = sums + lists.targets[l] * sum_step;
#pragma GCC unroll 12
    for (int v = 0; v < Vectors; ++v) {
      const Vec<T> before = load(sum + v * kLanes<T>);
      const Vec<T> after = before + (kTwo ? even[v] + odd[v] : even[v]);
      store<T>(sum + v * kLanes<T>, v + 1 < Vectors ? after : inside ? after : before);
    }
  }
}

template <class T, int Vectors = kMostVectors>
void add_lists(int vectors, const Lists<T>& lists, const T* values, int64_t value_step, T* sums, int64_t sum_step,
               int64_t last) {
  if (vectors == Vectors) return add_lists<T, Vectors>(lists, values, value_step, sums, sum_step, last);
  if constexpr (Vectors > 1) add_lists<T, Vectors - 1>(vectors, lists, values, value_step, sums, sum_step, last);
}

// How patches, kernels and sums are laid out.
template <class T>
struct BackwardLayout {
  const ConvReluPool2dBackward& call;
  const ConvPoolGeometry& g;
  const ConvShape shape;
  const int64_t positions;  // of a window
  const bool folded;
  const int64_t kernel_rows;  // that have chunks of their own
  const int64_t features, block;
  const int64_t slots_per_phase, slots;  // of a packed row; a phase: the columns that are equal modulo the dilation
  const int64_t group;                   // output channels that are worked on together

  explicit BackwardLayout(const ConvReluPool2dBackward& c)
      : call(c),
        g(c.geometry),
        shape(c.input, c.weight, c.grad_output, c.geometry),
        positions(g.pool_size[0] * g.pool_size[1]),
        folded(shape.kernel_h > 1 && shape.kernel_w * shape.c < kFoldedVectors * kLanes<T>),
        kernel_rows(folded ? 1 : shape.kernel_h),
        features(folded ? shape.kernel_h * shape.c : shape.c),
        block(choose_block()),
        slots_per_phase(
            ceil_div(max_of(packed_width(shape, g, shape.convolved_w), shape.w + g.padding[1]), g.dilation[1])),
        slots(slots_per_phase * g.dilation[1]),
        group(ceil_div(shape.k, ceil_div(shape.k, kGroup))) {}

  // A block's chunk fills the registers; blocks are equally long, in whole vectors where there are several.
  int64_t choose_block() const {
    const int64_t longest = max_of(kMostVectors / shape.kernel_w, 1) * kLanes<T>;
    const int64_t blocks = ceil_div(features, longest);
    return blocks <= 1 ? max_of(features, 1) : round_up(ceil_div(features, blocks), kLanes<T>);
  }

  PackedRows input_like(int64_t rows) const { return {shape.c, folded ? max_of(shape.c, 1) : block, slots, rows}; }
  PackedRows patch_rows(int64_t rows) const { return {features, block, slots, rows}; }

  // Rows that the patches of `pooled` rows of windows lie in: the input's, or, folded, the convolution's.
  int64_t convolved_rows(int64_t pooled) const { return (pooled - 1) * g.pool_stride[0] + g.pool_size[0]; }
  int64_t input_rows_of(int64_t pooled) const {
    return (convolved_rows(pooled) - 1) * g.stride[0] + (shape.kernel_h - 1) * g.dilation[0] + 1;
  }
  int64_t patch_row_step() const { return folded ? 1 : g.stride[0]; }

  int64_t slot(int64_t column) const {
    const int64_t phases = g.dilation[1];
    return phases == 1 ? column : column % phases * slots_per_phase + column / phases;
  }

  // The convolution's columns that `windows` neighbouring windows cover.
  int64_t covered(int64_t windows) const { return (windows - 1) * g.pool_stride[1] + g.pool_size[1]; }

  int64_t padded(int64_t length) const { return round_up(shape.kernel_w * length, kLanes<T>); }

  Span channels(int64_t task) const { return {task * group, min_of((task + 1) * group, shape.k)}; }

  // Where the kernels of a group, or the sums of their gradients, have a chunk: [chunk][channel of the group][taps].
  int64_t chunk_begin(const Chunk& chunk, Span group_channels) const {
    return group_channels.begin * packed_taps() + chunk.taps * group_channels.size();
  }

  // Taps of one kernel: [block][kernel row][kernel column, feature, rounded up to whole vectors].
  int64_t packed_taps() const {
    const PackedRows rows = patch_rows(1);
    const int64_t whole = max_of(rows.blocks() - 1, 0);
    return kernel_rows * (whole * padded(block) + padded(features - whole * block));
  }

  // Calls visit(chunk) for all chunks of a patch in `rows`, in the order of the packed taps.
  template <class Visit>
  void for_each_chunk(const PackedRows& rows, Visit visit) const {
    int64_t taps = 0;
    for (int64_t b = 0; b < rows.blocks(); ++b) {
      const int64_t length = rows.length(b), vectors = padded(length) / kLanes<T>;
      const int64_t step = ceil_div(vectors, ceil_div(vectors, kMostVectors));
      for (int64_t row = 0; row < kernel_rows; ++row, taps += padded(length))
        for (int64_t v = 0; v < vectors; v += step) {
          const int64_t count = min_of(step, vectors - v), last = (v + count - 1) * kLanes<T>;
          visit(Chunk{rows.row(b, row * g.dilation[0]) + v * kLanes<T>, length, taps + v * kLanes<T>,
                      static_cast<int>(count), min_of(kLanes<T>, shape.kernel_w * length - last)});
        }
    }
  }

  // Calls visit(kernel row, first channel, channels, offset) for the runs of channels in a column of block b.
  template <class Visit>
  void for_each_run(int64_t b, Visit visit) const {
    const int64_t end = min_of((b + 1) * block, features);
    for (int64_t f = b * block; f < end;) {
      const int64_t channel = f % shape.c, channels = min_of(shape.c - channel, end - f);
      visit(f / shape.c, channel, channels, f - b * block);
      f += channels;
    }
  }

  // Calls visit(kernel row, kernel column, first channel, channels, packed tap) for all taps.
  template <class Visit>
  void for_each_tap_run(Visit visit) const {
    const PackedRows rows = patch_rows(1);
    int64_t taps = 0;
    for (int64_t b = 0; b < rows.blocks(); ++b)
      for (int64_t row = 0; row < kernel_rows; ++row, taps += padded(rows.length(b)))
        for (int64_t column = 0; column < shape.kernel_w; ++column)
          for_each_run(b, [&](int64_t folded_row, int64_t channel, int64_t channels, int64_t offset) {
            visit(row + folded_row, column, channel, channels, taps + column * rows.length(b) + offset);
          });
  }

  // Calls visit(the phase's first slot, begin, end, column) for every phase: its slots from `begin` to `end` hold the
  // input's columns from `column` on, a dilation apart; those before and after hold padding.
  template <class Visit>
  void for_each_phase(Visit visit) const {
    const int64_t left = g.padding[1], step = g.dilation[1];
    for (int64_t phase = 0; phase < step; ++phase) {
      const int64_t begin = ceil_div(max_of(left - phase, 0), step),
                    end = ceil_div(max_of(left + shape.w - phase, 0), step);
      visit(phase * slots_per_phase, begin, end, phase + begin * step - left);
    }
  }

  // The input's row at which the windows of a pooled row begin; negative in the padding.
  int64_t first_row(int64_t pooled_row) const {
    return (pooled_row * g.pool_stride[0] - g.pool_padding[0]) * g.stride[0] - g.padding[0];
  }

  // Packs input rows from `first` on (negative and past the end: padding) into all of `rows`.
  void pack_rows(int64_t image, int64_t first, const PackedRows& rows, T* target) const {
    const Tensor& input = call.input;
    for (int64_t b = 0; b < rows.blocks(); ++b) {
      const int64_t length = rows.length(b);
      for (int64_t r = 0; r < rows.rows; ++r) {
        T* row = target + rows.row(b, r);
        const int64_t y = first + r;
        if (y < 0 || y >= shape.h) {
          memset(row, 0, static_cast<size_t>(slots * length) * sizeof(T));
          continue;
        }
        for_each_phase([&](int64_t slot, int64_t begin, int64_t end, int64_t column) {
          T* to = row + slot * length;
          memset(to, 0, static_cast<size_t>(begin * length) * sizeof(T));
          pack(at(input, image * input.stride[0] + b * rows.block * input.stride[1] + y * input.stride[2] +
                             column * input.stride[3]),
               input.dtype, end - begin, length, g.dilation[1] * input.stride[3], input.stride[1], to + begin * length,
               length);
          memset(to + end * length, 0, static_cast<size_t>((slots_per_phase - end) * length) * sizeof(T));
        });
      }
    }
  }

  // The opposite, for the gradient's rows from `first` to `end`; rows.rows begin with row `base`.
  void unpack_rows(int64_t image, Span input_rows, int64_t base, const PackedRows& rows, const T* source) const {
    const Tensor& gradient = call.grad_input;
    for (int64_t b = 0; b < rows.blocks(); ++b)
      for (int64_t y = max_of(input_rows.begin, 0); y < min_of(input_rows.end, shape.h); ++y)
        for_each_phase([&](int64_t slot, int64_t begin, int64_t end, int64_t column) {
          const int64_t length = rows.length(b);
          unpack(source + rows.row(b, y - base) + (slot + begin) * length, length, end - begin, length,
                 at_mutable(gradient, image * gradient.stride[0] + b * rows.block * gradient.stride[1] +
                                          y * gradient.stride[2] + column * gradient.stride[3]),
                 gradient.dtype, g.dilation[1] * gradient.stride[3], gradient.stride[1]);
        });
  }

  // Calls visit(run of channels in the input's rows, the same in the folded rows, channels), in the folded order.
  template <class Input, class Folded, class Visit>
  void for_each_folded_run(const PackedRows& input_rows, Input* input, const PackedRows& patches, Folded* target,
                           Visit visit) const {
    struct {
      Input* input;
      Folded* folded;
      int64_t channels;
    } runs[kMostVectors * kLanes<T>];  // of a column: at most a feature each
    const int64_t columns = slots, input_step = shape.c;
    for (int64_t b = 0; b < patches.blocks(); ++b)
      for (int64_t y = 0; y < patches.rows; ++y) {
        int64_t count = 0;
        for_each_run(b, [&](int64_t row, int64_t channel, int64_t channels, int64_t offset) {
          runs[count++] = {input + input_rows.row(0, y * g.stride[0] + row * g.dilation[0]) + channel,
                           target + patches.row(b, y) + offset, channels};
        });
        const int64_t folded_step = patches.length(b);
        for (int64_t s = 0; s < columns; ++s)
          for (int64_t i = 0; i < count; ++i)
            visit(runs[i].input + s * input_step, runs[i].folded + s * folded_step, runs[i].channels);
      }
  }

  // -1 where a window's position counts, 0 where ReLU cut: for arithmetic in place of a branch to mispredict.
  int64_t counts(uint8_t position) const { return (int64_t{position} - positions) >> 63; }

  // By window of a tile and position in it: the slot (counted through the rows) at which its patch begins; the tile's
  // first window row begins in row `base`. Positions outside of the convolution carry no gradient; they get some slot.
  void list_slots(int64_t base, Span pooled_rows, Span windows, int32_t* target) const {
    for (int64_t row = 0; row < pooled_rows.size(); ++row)
      for (int64_t window = windows.begin; window < windows.end; ++window)
        for (int64_t y = 0; y < g.pool_size[0]; ++y)
          for (int64_t x = 0; x < g.pool_size[1]; ++x) {
            const int64_t column = window * g.pool_stride[1] - g.pool_padding[1] + x;
            *target++ = static_cast<int32_t>((base + (row * g.pool_stride[0] + y) * patch_row_step()) * slots +
                                             slot(min_of(max_of(column, 0), shape.convolved_w - 1) * g.stride[1]));
          }
  }

  // Writes the pooled gradient of channel k in a row of windows, and returns their positions.
  const uint8_t* read_windows(int64_t image, int64_t k, int64_t row, Span windows, T* gradients) const {
    const Tensor &gradient = call.grad_output, &position = call.positions;
    const int64_t at_gradient = offset_of(gradient, image, k, row, windows.begin);
    const uint8_t* at_position =
        static_cast<const uint8_t*>(position.data) + offset_of(position, image, k, row, windows.begin);
    if (k + 1 < shape.k && gradient.stride[3] == 1) {  // the next channel's row is far away, and not foreseeable
      prefetch(at(gradient, at_gradient + gradient.stride[1]), windows.size() * element_size(gradient.dtype));
      prefetch(at_position + position.stride[1], windows.size());
    }
    pack(at(gradient, at_gradient), gradient.dtype, 1, windows.size(), 0, gradient.stride[3], gradients, 0);
    return at_position;
  }

  static int64_t offset_of(const Tensor& tensor, int64_t image, int64_t channel, int64_t row, int64_t column) {
    return image * tensor.stride[0] + channel * tensor.stride[1] + row * tensor.stride[2] + column * tensor.stride[3];
  }

  static void prefetch(const void* data, int64_t bytes) {
    constexpr int64_t kLine = 64;
    const char* line = static_cast<const char*>(data);
    for (int64_t i = 0; i < bytes + kLine; i += kLine) __builtin_prefetch(line + i);
  }
};

}  // namespace
}  // namespace FASTSEG_ISA
}  // namespace fastseg

// conv_relu_pool2d, backward: the gradients of weight and bias.
#pragma once

#include "convolution/conv_relu_pool2d_backward-inl.h"
#include "core/cache.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

// The sums are cut into parts by the shape alone, never by the number of threads, and the parts are added in their
// order: two runs are bitwise equal.
constexpr int64_t kTasks = 32;                    // parts x groups of channels, where there is work for so many
constexpr int64_t kPartBytes = 16 * 1024 * 1024;  // of all parts' sums
constexpr int64_t kLeastWindows = 48;             // in a part: enough to pay for writing its sums

template <class T>
struct BackwardWeight {
  const ConvReluPool2dBackward& call;
  const BackwardLayout<T> layout;
  const ConvShape& shape = layout.shape;
  const ConvPoolGeometry& g = call.geometry;
  const int64_t taps = layout.packed_taps();
  int64_t tile_rows, tile_windows;  // of pooled rows, and in each of them
  const int64_t parts = choose_parts();

  explicit BackwardWeight(const ConvReluPool2dBackward& c) : call(c), layout(c) { choose_tile(); }

  // Bytes of the patches' rows that a tile reads in one pass, one block of features wide.
  int64_t tile_bytes(int64_t rows, int64_t windows) const {
    const int64_t columns = (layout.covered(windows) - 1) * g.stride[1] + shape.kernel_w;
    return layout.convolved_rows(rows) * columns * layout.block * int64_t{sizeof(T)};
  }

  bool fits(int64_t rows, int64_t windows) const {
    const int64_t list_bytes = rows * windows * layout.group * int64_t{sizeof(T) + sizeof(int32_t)};
    return tile_bytes(rows, windows) <= kWindowTileBytes && list_bytes <= kWindowListBytes;
  }

  // A row of windows, or several, or an even share of one.
  void choose_tile() {
    int64_t most_windows = 1;
    while (most_windows < shape.pooled_w && fits(1, most_windows + 1)) ++most_windows;
    const int64_t tiles = max_of(ceil_div(shape.pooled_w, most_windows), 1);
    tile_windows = max_of(ceil_div(shape.pooled_w, tiles), 1);
    tile_rows = 1;
    while (tiles == 1 && tile_rows < shape.pooled_h && fits(tile_rows + 1, tile_windows)) ++tile_rows;
  }

  int64_t choose_parts() const {
    const int64_t rows = shape.n * shape.pooled_h, groups = ceil_div(shape.k, layout.group);
    const int64_t by_bytes = kPartBytes / max_of(shape.k * taps * int64_t{sizeof(T)}, 1);
    const int64_t by_work = rows * shape.pooled_w / kLeastWindows;
    return max_of(min_of(min_of(ceil_div(kTasks, groups), rows), min_of(by_bytes, by_work)), 1);
  }

  // Lists the windows of a tile that carry gradient of channel k, and returns the sum of it.
  T list_windows(int64_t image, int64_t k, Span rows, Span windows, const int32_t* slots, T* gradients,
                 int32_t* indices, int32_t* count) const {
    const int64_t step = call.positions.stride[3];
    int64_t listed = 0;
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      // They are read to where they may stay: what is listed never runs ahead of what is read.
      T* read = gradients + (row - rows.begin) * windows.size();
      const uint8_t* position = layout.read_windows(image, k, row, windows, read);
      for (int64_t p = 0; p < windows.size(); ++p, position += step, slots += layout.positions) {
        const int64_t counts = layout.counts(*position);
        gradients[listed] = read[p];  // written always, kept only where the window counts
        indices[listed] = slots[*position & counts];
        listed -= counts;
      }
    }
    *count = static_cast<int32_t>(listed);
    return sum_of(gradients, listed);
  }

  static T sum_of(const T* values, int64_t count) {
    Vec<T> sums = {};
    int64_t i = 0;
    for (; i + kLanes<T> <= count; i += kLanes<T>) sums += load(values + i);
    T sum = 0;
    for (int lane = 0; lane < kLanes<T>; ++lane) sum += sums[lane];
    for (; i < count; ++i) sum += values[i];
    return sum;
  }

  // Part `part` of the gradients of one group of channels: a range of pooled rows, counted through all images.
  bool run(int64_t part, Span channels, T* grad_weight, T* grad_bias) const {
    const PackedRows input_rows = layout.input_like(layout.input_rows_of(tile_rows));
    const PackedRows patch_rows = layout.folded ? layout.patch_rows(layout.convolved_rows(tile_rows)) : input_rows;
    const int64_t tile = tile_rows * tile_windows;
    const int64_t input_elements = call.grad_weight ? input_rows.elements() + kLanes<T> : 0;
    const int64_t folded_elements = call.grad_weight && layout.folded ? patch_rows.elements() + kLanes<T> : 0;
    const int64_t numbers = channels.size() * tile + 2 * channels.size() + tile * layout.positions;
    T* input =
        static_cast<T*>(scratch((input_elements + folded_elements + channels.size() * tile) * int64_t{sizeof(T)} +
                                numbers * int64_t{sizeof(int32_t)}));
    if (input == nullptr) return false;
    T* folded = input + input_elements;
    T* gradients = folded + folded_elements;
    int32_t* indices = reinterpret_cast<int32_t*>(gradients + channels.size() * tile);
    int32_t* counts = indices + channels.size() * tile;
    int32_t* targets = counts + channels.size();
    int32_t* slots = targets + channels.size();
    for (int32_t k = 0; k < channels.size(); ++k) targets[k] = k;
    memset(grad_weight, 0, static_cast<size_t>(channels.size() * taps) * sizeof(T));
    memset(grad_bias, 0, static_cast<size_t>(channels.size()) * sizeof(T));

    const int64_t pooled_rows = shape.n * shape.pooled_h, end = (part + 1) * pooled_rows / parts;
    for (int64_t r = part * pooled_rows / parts, next; r < end; r = next) {
      const int64_t image = r / shape.pooled_h, row = r % shape.pooled_h;
      next = min_of(min_of(r + tile_rows, end), (image + 1) * shape.pooled_h);
      const Span rows = {row, row + next - r};
      if (call.grad_weight) {
        layout.pack_rows(image, layout.first_row(row), input_rows, input);
        if (layout.folded) fold(input_rows, patch_rows, input, folded);
      }
      for (int64_t first = 0; first < shape.pooled_w; first += tile_windows) {
        const Span windows = {first, min_of(first + tile_windows, shape.pooled_w)};
        layout.list_slots(0, rows, windows, slots);
        for (int64_t k = 0; k < channels.size(); ++k)
          grad_bias[k] += list_windows(image, channels.begin + k, rows, windows, slots, gradients + k * tile,
                                       indices + k * tile, counts + k);
        if (!call.grad_weight) continue;
        const Lists<T> lists = {gradients, indices, counts, targets, channels.size(), tile};
        layout.for_each_chunk(patch_rows, [&](const Chunk& chunk) {
          add_lists(chunk.vectors, lists, (layout.folded ? folded : input) + chunk.source, chunk.features,
                    grad_weight + chunk.taps * channels.size(), int64_t{chunk.vectors} * kLanes<T>, kLanes<T>);
        });
      }
    }
    return true;
  }

  // Copies a column's runs in whole vectors: what runs over a run's end is overwritten by the next.
  void fold(const PackedRows& input_rows, const PackedRows& patch_rows, const T* input, T* folded) const {
    layout.for_each_folded_run(input_rows, input, patch_rows, folded, [](const T* from, T* to, int64_t channels) {
      for (int64_t i = 0; i < channels; i += kLanes<T>) store<T>(to + i, load(from + i));
    });
  }

  // Adds the parts in their order and writes the gradients of channel k.
  bool reduce(int64_t k, const T* grad_weight, const T* grad_bias) const {
    const Tensor &weight = call.grad_weight, &bias = call.grad_bias;
    if (bias) {
      double sum = 0;
      for (int64_t part = 0; part < parts; ++part) sum += static_cast<double>(grad_bias[part * shape.k + k]);
      const T value = static_cast<T>(sum);
      unpack(&value, 1, 1, 1, at_mutable(bias, k * bias.stride[0]), bias.dtype, 1, 1);
    }
    if (!weight) return true;
    T* kernel = static_cast<T*>(scratch(taps * int64_t{sizeof(T)}));
    if (kernel == nullptr) return false;
    const Span channels = layout.channels(k / layout.group);
    layout.for_each_chunk(layout.patch_rows(1), [&](const Chunk& chunk) {
      const int64_t length = int64_t{chunk.vectors} * kLanes<T>;
      const T* sums = grad_weight + layout.chunk_begin(chunk, channels) + (k - channels.begin) * length;
      if (parts == 1) {
        memcpy(kernel + chunk.taps, sums, static_cast<size_t>(length) * sizeof(T));
        return;
      }
      double total[kMostVectors * kLanes<T>] = {};
      for (int64_t part = 0; part < parts; ++part, sums += shape.k * taps)
        for (int64_t i = 0; i < length; ++i) total[i] += static_cast<double>(sums[i]);
      for (int64_t i = 0; i < length; ++i) kernel[chunk.taps + i] = static_cast<T>(total[i]);
    });
    layout.for_each_tap_run([&](int64_t row, int64_t column, int64_t channel, int64_t count, int64_t tap) {
      const int64_t offset =
          k * weight.stride[0] + channel * weight.stride[1] + row * weight.stride[2] + column * weight.stride[3];
      unpack(kernel + tap, count, 1, count, at_mutable(weight, offset), weight.dtype, 1, weight.stride[1]);
    });
    return true;
  }

  void run_all() const {
    const int64_t groups = ceil_div(shape.k, layout.group);
    Workspace workspace(parts * shape.k * (taps + 1) * int64_t{sizeof(T)});
    T* grad_weight = static_cast<T*>(workspace.data());
    T* grad_bias = grad_weight + parts * shape.k * taps;
    for_each_task(parts * groups, call.threads, [&](int64_t task) {
      const int64_t part = task / groups;
      const Span channels = layout.channels(task % groups);
      return run(part, channels, grad_weight + (part * shape.k + channels.begin) * taps,
                 grad_bias + part * shape.k + channels.begin);
    });
    for_each_task(shape.k, call.threads, [&](int64_t k) { return reduce(k, grad_weight, grad_bias); });
  }
};

}  // namespace
}  // namespace FASTSEG_ISA
}  // namespace fastseg

// conv_relu_pool2d, backward: the gradient of the input.
#pragma once

#include "convolution/conv_relu_pool2d_backward-inl.h"
#include "core/cache.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

template <class T>
struct BackwardInput {
  const ConvReluPool2dBackward& call;
  const BackwardLayout<T> layout;
  const ConvShape& shape = layout.shape;
  const ConvPoolGeometry& g = call.geometry;
  const int64_t taps = layout.packed_taps();
  // Each band of pooled rows has its own rows of the gradient, from those where its first window begins to those where
  // the next band's does, and reaches that many more: bands are so large that a row belongs to at most two.
  const int64_t shared = max_of(layout.input_rows_of(1) - g.pool_stride[0] * g.stride[0], 0);
  const int64_t band = choose_band();  // pooled rows
  const int64_t bands = max_of(ceil_div(shape.pooled_h, band), 1);
  const int64_t tile = choose_tile();  // windows of a row
  const PackedRows edge = layout.input_like(shared);

  explicit BackwardInput(const ConvReluPool2dBackward& c) : call(c), layout(c) {}

  int64_t choose_band() const {
    const int64_t step = g.pool_stride[0] * g.stride[0];
    const int64_t row_bytes = layout.slots * shape.c * int64_t{sizeof(T)};
    const int64_t fitting = (kDirectGradientBytes / max_of(row_bytes, 1) - shared) / step;
    const int64_t rows = min_of(max_of(max_of(fitting, ceil_div(shared, step)), 1), max_of(shape.pooled_h, 1));
    return max_of(ceil_div(shape.pooled_h, max_of(shape.pooled_h / rows, 1)), 1);
  }

  int64_t choose_tile() const {
    const int64_t window_bytes = layout.positions * layout.group * int64_t{sizeof(T) + sizeof(int32_t)};
    const int64_t tiles = ceil_div(shape.pooled_w, max_of(kWindowListBytes / window_bytes, 1));
    return ceil_div(shape.pooled_w, max_of(tiles, 1));
  }

  // Rows that the bands of an image begin and end with; the last one's end is the image's.
  Span band_rows(int64_t b) const {
    return {layout.first_row(b * band),
            b + 1 < bands ? layout.first_row((b + 1) * band) : max_of(shape.h, layout.first_row(bands * band))};
  }

  // Lists the channels of a group by the position of their maximum, for the windows of a tile.
  void list_channels(int64_t image, Span channels, int64_t row, Span windows, T* read, const Lists<T>& lists) const {
    memset(lists.counts, 0, static_cast<size_t>(lists.lists) * sizeof(int32_t));
    const int64_t step = call.positions.stride[3];
    for (int64_t k = channels.begin; k < channels.end; ++k) {
      const uint8_t* position = layout.read_windows(image, k, row, windows, read);
      int64_t first = 0;  // list of the window
      for (int64_t p = 0; p < windows.size(); ++p, position += step, first += layout.positions) {
        const int64_t counts = layout.counts(*position), list = first + (*position & counts);
        const int64_t entry = list * lists.capacity + lists.counts[list];
        lists.gradients[entry] = read[p];  // written always, kept only where the window counts
        lists.indices[entry] = static_cast<int32_t>(k - channels.begin);
        lists.counts[list] -= static_cast<int32_t>(counts);
      }
    }
  }

  // Adds the gradient of one row of windows to the rows `target`, from row `base` on.
  void add_row(int64_t image, int64_t row, const T* kernels, const PackedRows& rows, int64_t base, T* memory,
               T* target) const {
    const int64_t most_lists = tile * layout.positions;
    T* read = memory;
    T* gradients = read + tile;
    int32_t* indices = reinterpret_cast<int32_t*>(gradients + most_lists * layout.group);
    int32_t* counts = indices + most_lists * layout.group;
    int32_t* slots = counts + most_lists;
    for (int64_t first = 0; first < shape.pooled_w; first += tile) {
      const Span windows = {first, min_of(first + tile, shape.pooled_w)};
      layout.list_slots(base, {0, 1}, windows, slots);
      const Lists<T> lists = {gradients, indices, counts, slots, windows.size() * layout.positions, layout.group};
      for (int64_t task = 0; task < ceil_div(shape.k, layout.group); ++task) {
        const Span channels = layout.channels(task);
        list_channels(image, channels, row, windows, read, lists);
        layout.for_each_chunk(rows, [&](const Chunk& chunk) {
          add_lists(chunk.vectors, lists, kernels + layout.chunk_begin(chunk, channels),
                    int64_t{chunk.vectors} * kLanes<T>, target + chunk.source, chunk.features, chunk.last);
        });
      }
    }
  }

  int64_t list_elements() const {
    const int64_t lists = tile * layout.positions;
    const int64_t numbers = lists * layout.group + 2 * lists;
    return tile + lists * layout.group + ceil_div(numbers * int64_t{sizeof(int32_t)}, sizeof(T));
  }

  // The gradient of one band's rows. What it shares with its neighbours is left in `edges`, for join().
  bool run(int64_t task, const T* kernels, T* edges) const {
    const int64_t image = task / bands, b = task % bands;
    const Span rows = band_rows(b);
    const PackedRows gradient_rows = layout.input_like(rows.size() + shared);
    const PackedRows folded_rows = layout.patch_rows(layout.convolved_rows(1));
    const int64_t elements = gradient_rows.elements() + kLanes<T>;
    const int64_t folded_elements = layout.folded ? folded_rows.elements() + kLanes<T> : 0;
    T* gradient = static_cast<T*>(scratch((elements + folded_elements + list_elements()) * int64_t{sizeof(T)}));
    if (gradient == nullptr) return false;
    T* folded = gradient + elements;
    T* lists = folded + folded_elements;
    memset(gradient, 0, static_cast<size_t>(elements) * sizeof(T));
    for (int64_t row = b * band; row < min_of((b + 1) * band, shape.pooled_h); ++row) {
      const int64_t base = layout.first_row(row) - rows.begin;
      if (!layout.folded) {
        add_row(image, row, kernels, gradient_rows, base, lists, gradient);
        continue;
      }
      memset(folded, 0, static_cast<size_t>(folded_elements) * sizeof(T));
      add_row(image, row, kernels, folded_rows, 0, lists, folded);
      T* target = gradient + gradient_rows.row(0, base);
      layout.for_each_folded_run(gradient_rows, target, folded_rows, folded,
                                 [](T* to, const T* from, int64_t channels) {
                                   for (int64_t i = 0; i < channels; ++i) to[i] += from[i];
                                 });
    }
    const bool first = b == 0, last = b + 1 == bands;
    T* before = edges + 2 * (image * (bands - 1) + b - 1) * edge.elements();
    T* after = before + 2 * edge.elements();
    if (!first) copy_edge(gradient_rows, 0, gradient, before + edge.elements());
    if (!last) copy_edge(gradient_rows, rows.size(), gradient, after);
    layout.unpack_rows(image, {rows.begin + (first ? 0 : shared), rows.end}, rows.begin, gradient_rows, gradient);
    return true;
  }

  void copy_edge(const PackedRows& rows, int64_t row, const T* gradient, T* target) const {
    for (int64_t b = 0; b < rows.blocks(); ++b)
      memcpy(target + edge.begin(b), gradient + rows.row(b, row),
             static_cast<size_t>(shared * edge.slots * edge.length(b)) * sizeof(T));
  }

  // Adds what two bands left of the rows that they share, and writes it.
  void join(int64_t task, T* edges) const {
    const int64_t image = task / (bands - 1), b = task % (bands - 1), begin = layout.first_row((b + 1) * band);
    T* sum = edges + 2 * task * edge.elements();
    for (int64_t i = 0; i < edge.elements(); ++i) sum[i] += sum[edge.elements() + i];
    layout.unpack_rows(image, {begin, begin + shared}, begin, edge, sum);
  }

  // Packs the kernel of channel k, chunk by chunk.
  bool pack_kernel(int64_t k, T* kernels) const {
    T* kernel = static_cast<T*>(scratch(taps * int64_t{sizeof(T)}));
    if (kernel == nullptr) return false;
    const Tensor& weight = call.weight;
    memset(kernel, 0, static_cast<size_t>(taps) * sizeof(T));
    layout.for_each_tap_run([&](int64_t row, int64_t column, int64_t channel, int64_t count, int64_t tap) {
      const int64_t offset =
          k * weight.stride[0] + channel * weight.stride[1] + row * weight.stride[2] + column * weight.stride[3];
      pack(at(weight, offset), weight.dtype, 1, count, 1, weight.stride[1], kernel + tap, count);
    });
    const Span channels = layout.channels(k / layout.group);
    layout.for_each_chunk(layout.patch_rows(1), [&](const Chunk& chunk) {
      const int64_t length = int64_t{chunk.vectors} * kLanes<T>;
      memcpy(kernels + layout.chunk_begin(chunk, channels) + (k - channels.begin) * length, kernel + chunk.taps,
             static_cast<size_t>(length) * sizeof(T));
    });
    return true;
  }

  void run_all() const {
    const int64_t boundaries = shape.n * (bands - 1);
    Workspace workspace((shape.k * taps + 2 * boundaries * edge.elements()) * int64_t{sizeof(T)});
    T* kernels = static_cast<T*>(workspace.data());
    T* edges = kernels + shape.k * taps;
    for_each_task(shape.k, call.threads, [&](int64_t k) { return pack_kernel(k, kernels); });
    for_each_task(shape.n * bands, call.threads, [&](int64_t task) { return run(task, kernels, edges); });
    for_each_task(boundaries, call.threads, [&](int64_t task) {
      join(task, edges);
      return true;
    });
  }
};

}  // namespace
}  // namespace FASTSEG_ISA
}  // namespace fastseg

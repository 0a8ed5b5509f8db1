// The gradients of a 3x3 convolution's weight and bias by Winograd's algorithm: F(3x3, 2x2), whose tile is 2x2 of the
// convolution's output. It is the transpose of F(2x2, 3x3), and needs 16 products where plain sums take 36:
//
//   grad_weight = G^T [ sum over tiles of (A tile A^T) * (B^T patch B) ] G     * by element
//
// The sums over tiles are matrix products, output channels x tiles by tiles x input channels. Product (1, 1) of a tile
// is the sum of its four values, so that the bias' gradient comes with them.
#pragma once

#include "convolution/conv_relu_pool2d.h"
#include "convolution/register_tile-inl.h"
#include "convolution/winograd-inl.h"
#include "core/cache.h"
#include "core/parallel.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

// Channels on either side that a task works on: their sums take 256 KB of a second-level cache in float.
constexpr int64_t kWeightGroup = 64;
// The sums are cut into parts by the shape alone, never by the number of threads, and the parts are added in their
// order: two runs are bitwise equal.
constexpr int64_t kWeightParts = 32;
constexpr int64_t kWeightPartBytes = 16 * 1024 * 1024;  // of all parts' sums, as long as there are kTasksWanted
constexpr int64_t kWeightPartTiles = 512;               // in a part: enough to pay for writing its sums
// Of sums that are in memory at a time, as long as there are tasks enough for all threads.
constexpr int64_t kWeightSumsBytes = 4 * 1024 * 1024;
// How much larger than |input| * |gradient| a tile's part of a sum may become: 4 and 4 by the transforms of patch and
// tile, and again 4 by that of the sum.
constexpr int kWeightGrowth = 64;

// A g, for a line of two vectors.
template <class V>
FASTSEG_INLINE void transform_tile_line(V a, V b, V (&target)[kSide]) {
  target[0] = a, target[1] = a + b, target[2] = a - b, target[3] = -b;
}

// Transforms some of the tiles of packed rows of `features` channels, which are counted as transform_patches() counts
// windows, to the same layout, and adds their values up by channel.
template <class T>
void transform_tiles(const T* rows, int64_t features, int64_t tiles_w, Span tiles, int64_t plane, T* target,
                     T* totals) {
  const int64_t pitch = kPoolSide * tiles_w * features, step = round_up(features, kLanes<T>);
  int64_t row = tiles.begin / tiles_w, column = tiles.begin % tiles_w;
  for (int64_t tile = tiles.begin; tile < tiles.end; ++tile, target += step) {
    const T* values = rows + kPoolSide * (row * pitch + column * features);
    for (int64_t k = 0; k < step; k += kLanes<T>) {
      Vec<T> lines[kPoolSide][kSide], products[kSide][kSide];
#pragma GCC unroll 2
      for (int y = 0; y < kPoolSide; ++y)
        transform_tile_line(load(values + y * pitch + k), load(values + y * pitch + features + k), lines[y]);
#pragma GCC unroll 4
      for (int x = 0; x < kSide; ++x) {
        transform_tile_line(lines[0][x], lines[1][x], products[x]);
#pragma GCC unroll 4
        for (int y = 0; y < kSide; ++y) store<T>(target + (y * kSide + x) * plane + k, products[x][y]);
      }
      store<T>(totals + k, load(totals + k) + products[1][1]);
    }
    if (++column == tiles_w) column = 0, ++row;
  }
}

// G^T m, for a line of four vectors.
template <class V>
FASTSEG_INLINE void transform_sum_line(const V (&m)[kSide], V (&target)[kKernelSide]) {
  const V middle = (m[1] + m[2]) / 2;
  target[0] = m[0] + middle, target[1] = (m[1] - m[2]) / 2, target[2] = middle + m[3];
}

// Two matrices whose rows are the terms of sums.
template <class T>
struct Factors {
  const T *left, *right;
  int64_t left_step, right_step, terms;
};

// sums[r] += sum over terms of left[term][r] * right[term], for Rows x Vectors vectors.
template <class T, int Vectors, int Rows>
FASTSEG_NOINLINE void add_products(Factors<T> factors, T* sums, int64_t sum_step) {
  Vec<T> sum[Rows][Vectors] = {};
  for (; factors.terms > 0; --factors.terms, factors.left += factors.left_step, factors.right += factors.right_step) {
    Vec<T> right[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) right[v] = load(factors.right + v * kLanes<T>);
#pragma GCC unroll 24
    for (int r = 0; r < Rows; ++r) {
      const Vec<T> left = broadcast(factors.left[r]);
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) sum[r][v] += left * right[v];
    }
  }
#pragma GCC unroll 24
  for (int r = 0; r < Rows; ++r, sums += sum_step)
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) store<T>(sums + v * kLanes<T>, load(sums + v * kLanes<T>) + sum[r][v]);
}

template <class T, int Vectors, int Rows = kPixels<Vectors>>
void add_products(int64_t rows, const Factors<T>& factors, T* sums, int64_t sum_step) {
  if (rows == Rows) return add_products<T, Vectors, Rows>(factors, sums, sum_step);
  if constexpr (Rows > 1) add_products<T, Vectors, Rows - 1>(rows, factors, sums, sum_step);
}

template <class T>
struct WinogradWeight {
  const Conv2dWinogradBackward& call;
  const int64_t n, c, k;
  const int64_t tiles_h, tiles_w;
  const int64_t c_group, k_group;  // channels that a task works on
  const int64_t c_groups, k_groups;
  const int64_t band;  // rows of tiles that are packed together
  const int64_t parts;

  explicit WinogradWeight(const Conv2dWinogradBackward& b)
      : call(b),
        n(b.input.size[0]),
        c(b.input.size[1]),
        k(b.weight.size[0]),
        tiles_h(ceil_div(b.grad_output.size[2], kPoolSide)),
        tiles_w(ceil_div(b.grad_output.size[3], kPoolSide)),
        c_group(choose_group(c)),
        k_group(choose_group(k)),
        c_groups(ceil_div(c, c_group)),
        k_groups(ceil_div(k, k_group)),
        band(choose_band()),
        parts(choose_parts()) {}

  // Groups of nearly one size, in whole vectors.
  static int64_t choose_group(int64_t channels) {
    return round_up(ceil_div(channels, ceil_div(channels, kWeightGroup)), kLanes<T>);
  }

  int64_t choose_band() const {
    const int64_t row_bytes = patches_width(tiles_w) * (c_group + k_group) * int64_t{sizeof(T)};
    return min_of(max_of((kWinogradBandBytes / row_bytes - 1) / kPoolSide, ceil_div(kLeastWindows, tiles_w)), tiles_h);
  }

  int64_t choose_parts() const {
    const int64_t by_bytes = kWeightPartBytes / (k_groups * c_groups * pair_elements() * int64_t{sizeof(T)});
    const int64_t by_work = n * tiles_h * tiles_w / kWeightPartTiles;
    const int64_t wanted = min_of(min_of(by_bytes, by_work), kWeightParts);
    return max_of(min_of(max_of(wanted, ceil_div(kTasksWanted, c_groups * k_groups)), n * ceil_div(tiles_h, band)), 1);
  }

  // The sums of a pair of groups: [products][k_group][c_group].
  int64_t plane() const { return k_group * c_group; }
  int64_t pair_elements() const { return kProducts * plane(); }

  // The share of a part in the sums of a pair of groups, and in the totals of the gradients of the k group.
  bool run(int64_t part, Span k_span, Span c_span, T* sums, T* totals, bool* safe) const {
    const Tensor gradient = part_of(call.grad_output, 1, k_span), input = part_of(call.input, 1, c_span);
    const Tensor passed = part_of(call.passed, 1, k_span);
    const int64_t k_step = round_up(k_span.size(), kLanes<T>), c_step = round_up(c_span.size(), kLanes<T>);

    // As many windows at a time as fit the cache, evenly divided.
    const int64_t fitting = kWinogradPatchBytes / (kProducts * (k_step + c_step) * int64_t{sizeof(T)});
    const int64_t chunks = ceil_div(band * tiles_w, min_of(max_of(fitting, kLeastWindows), kMostWindows));
    const int64_t chunk = ceil_div(band * tiles_w, chunks);
    const int64_t k_plane = chunk * k_step + kRowPadding, c_plane = chunk * c_step + kRowPadding;

    const int64_t input_pitch = patches_width(tiles_w) * c_span.size(),
                  gradient_pitch = kPoolSide * tiles_w * k_span.size();
    const int64_t input_elements = round_up((kPoolSide * (band - 1) + kSide) * input_pitch, kLanes<T>) + kLanes<T>;
    const int64_t gradient_elements = round_up(kPoolSide * band * gradient_pitch, kLanes<T>) + kLanes<T>;
    const int64_t passed_row = passed ? gradient_pitch : 0;
    const int64_t elements = input_elements + gradient_elements + kProducts * (k_plane + c_plane) + passed_row;
    T* packed_input = static_cast<T*>(scratch(elements * int64_t{sizeof(T)}));
    if (packed_input == nullptr) return false;
    T* packed_gradient = packed_input + input_elements;
    T* patches = packed_gradient + gradient_elements;
    T* tiles = patches + kProducts * c_plane;
    T* buffer = packed_input + elements - passed_row;
    memset(sums, 0, static_cast<size_t>(pair_elements()) * sizeof(T));
    memset(totals, 0, static_cast<size_t>(k_group) * sizeof(T));

    const int64_t bands = ceil_div(tiles_h, band), all = n * bands, begin = part * all / parts;
    for (int64_t b = begin; b < (part + 1) * all / parts; ++b) {
      const int64_t image = b / bands, top = b % bands * band, rows = min_of(band, tiles_h - top);
      const int64_t first = kPoolSide * top - call.padding[0];
      const bool continues = b > begin && top > 0;  // the band above is packed: its last rows are this one's first
      const int64_t kept = continues ? kSide - kPoolSide : 0;
      memmove(packed_input, packed_input + kPoolSide * band * input_pitch,
              static_cast<size_t>(kept * input_pitch) * sizeof(T));
      const Span input_rows = {first, first + kPoolSide * (rows - 1) + kSide};
      const Span gradient_rows = {kPoolSide * top, kPoolSide * (top + rows)};
      const T largest =
          pack_band(input, Tensor{}, call.padding[1], image, input_rows, kept, input_pitch, buffer, packed_input) *
          pack_band(gradient, passed, 0, image, gradient_rows, 0, gradient_pitch, buffer, packed_gradient);
      if (!may_go_on(largest <= largest_safe_product(), safe)) return true;
      for (int64_t window = 0; window < rows * tiles_w; window += chunk) {
        const Span windows = {window, min_of(window + chunk, rows * tiles_w)};
        transform_tiles(packed_gradient, k_span.size(), tiles_w, windows, k_plane, tiles, totals);
        if (!call.grad_weight) continue;
        transform_patches(packed_input, c_span.size(), tiles_w, windows, c_plane, patches);
        for (int64_t product = 0; product < kProducts; ++product)
          multiply(tiles + product * k_plane, k_span.size(), patches + product * c_plane, c_step, windows.size(),
                   sums + product * plane());
      }
    }
    return true;
  }

  // Packs rows but for the first ones that are `kept`, and the zeros that are read past their end, and returns the
  // largest magnitude of all.
  static T pack_band(const Tensor& tensor, const Tensor& passed, int64_t left_padding, int64_t image, Span rows,
                     int64_t kept, int64_t pitch, T* buffer, T* target) {
    const int64_t elements = rows.size() * pitch, width = pitch / tensor.size[1];
    const int64_t whole = elements / kLanes<T> * kLanes<T>, end = round_up(elements, kLanes<T>) + kLanes<T>;
    memset(target + whole, 0, static_cast<size_t>(end - whole) * sizeof(T));
    pack_passed(tensor, passed, left_padding, image, {rows.begin + kept, rows.end}, width, buffer,
                target + kept * pitch);
    return largest_magnitude(target, round_up(elements, kLanes<T>));
  }

  // No sum over all tiles overflows.
  T largest_safe_product() const {
    return kLargestFinite<T> / static_cast<T>(kWeightGrowth) / static_cast<T>(n * tiles_h * tiles_w);
  }

  // One product of all tiles of a chunk, added to its sums.
  void multiply(const T* tiles, int64_t k_count, const T* patches, int64_t c_step, int64_t windows, T* sums) const {
    const int64_t k_step = round_up(k_count, kLanes<T>);
    for (int64_t column = 0; column < c_step; column += kBlock<T>) {
      const bool two = c_step - column > kLanes<T>;
      const int64_t steps = ceil_div(k_count, two ? kPixels<2> : kPixels<1>);
      for (int64_t step = 0; step < steps; ++step) {
        const int64_t begin = step * k_count / steps, count = (step + 1) * k_count / steps - begin;
        const Factors<T> factors = {tiles + begin, patches + column, k_step, c_step, windows};
        T* target = sums + begin * c_group + column;
        two ? add_products<T, 2>(count, factors, target, c_group) : add_products<T, 1>(count, factors, target, c_group);
      }
    }
  }

  Span k_span(int64_t pair) const { return span_of(pair / pair_columns() * k_group, k_group, k); }
  Span c_span(int64_t pair) const { return span_of(pair % pair_columns() * c_group, c_group, c); }
  static Span span_of(int64_t begin, int64_t group, int64_t end) { return {begin, min_of(begin + group, end)}; }

  // Groups of input channels: the bias alone needs the input's range, and no more.
  int64_t pair_columns() const { return call.grad_weight ? c_groups : 1; }

  // Adds a pair's parts in their order, and writes the gradients of an output channel's weights.
  bool write_weight(int64_t pair, int64_t channel, const T* sums) const {
    const Tensor& weight = call.grad_weight;
    const Span outputs = k_span(pair), inputs = c_span(pair);
    if (channel >= outputs.size()) return true;
    T* taps = static_cast<T*>(scratch(kKernelTaps * c_group * int64_t{sizeof(T)}));
    if (taps == nullptr) return false;
    for (int64_t column = 0; column < inputs.size(); column += kLanes<T>)
      transform_sums(sums + channel * c_group + column, taps + column);
    const int64_t first = (outputs.begin + channel) * weight.stride[0] + inputs.begin * weight.stride[1];
    for (int64_t row = 0; row < kKernelSide; ++row)
      unpack(taps + row * kKernelSide * c_group, c_group, kKernelSide, inputs.size(),
             at_mutable(weight, first + row * weight.stride[2]), weight.dtype, weight.stride[3], weight.stride[1]);
    return true;
  }

  // G^T m G of a vector's sums. target: [taps][c_group].
  void transform_sums(const T* sums, T* target) const {
    Vec<T> m[kSide][kSide], columns[kSide][kKernelSide];
    for (int product = 0; product < kProducts; ++product) {
      Vec<T> sum = {};
      for (int64_t part = 0; part < parts; ++part) sum += load(sums + product * plane() + part * pair_elements());
      m[product % kSide][product / kSide] = sum;
    }
    for (int x = 0; x < kSide; ++x) transform_sum_line(m[x], columns[x]);
    for (int y = 0; y < kKernelSide; ++y) {
      const Vec<T> line[kSide] = {columns[0][y], columns[1][y], columns[2][y], columns[3][y]};
      Vec<T> taps[kKernelSide];
      transform_sum_line(line, taps);
      for (int x = 0; x < kKernelSide; ++x) store<T>(target + (y * kKernelSide + x) * c_group, taps[x]);
    }
  }

  void write_bias(const T* totals) const {
    const Tensor& bias = call.grad_bias;
    for (int64_t channel = 0; channel < k; ++channel, ++totals) {
      T sum = 0;
      for (int64_t part = 0; part < parts; ++part) sum += totals[part * k_groups * k_group];
      unpack(&sum, 1, 1, 1, at_mutable(bias, channel * bias.stride[0]), bias.dtype, 1, 1);
    }
  }

  // Pairs whose sums are in memory at a time, evenly divided. No sum depends on it.
  int64_t choose_pairs_at_once(int64_t pairs) const {
    const int64_t fitting = kWeightSumsBytes / (parts * pair_elements() * int64_t{sizeof(T)});
    const int64_t busy = ceil_div(max_of(kTasksWanted, call.threads), parts);
    return ceil_div(pairs, ceil_div(pairs, max_of(fitting, busy)));
  }

  // Whether it did.
  bool run_all() const {
    const int64_t pairs = k_groups * pair_columns(), pairs_at_once = choose_pairs_at_once(pairs);
    const int64_t step = parts * pair_elements(), sums_elements = pairs_at_once * step;
    Workspace workspace((sums_elements + pairs * parts * k_group) * int64_t{sizeof(T)});
    advise_huge_pages(workspace.data(), sums_elements * int64_t{sizeof(T)});
    T* sums = static_cast<T*>(workspace.data());
    T* totals = sums + sums_elements;
    bool safe = true;
    for (int64_t first = 0; first < pairs; first += pairs_at_once) {
      const int64_t count = min_of(pairs_at_once, pairs - first);
      for_each_task(count * parts, call.threads, [&](int64_t task) {
        const int64_t pair = first + task / parts, part = task % parts;
        T* totals_of = totals + (pair % pair_columns() * parts + part) * k_groups * k_group + k_span(pair).begin;
        return run(part, k_span(pair), c_span(pair), sums + task * pair_elements(), totals_of, &safe);
      });
      if (!safe) return false;
      if (!call.grad_weight) continue;
      for_each_task(count * k_group, call.threads, [&](int64_t task) {
        return write_weight(first + task / k_group, task % k_group, sums + task / k_group * step);
      });
    }
    if (call.grad_bias) write_bias(totals);
    return true;
  }
};

}  // namespace
}  // namespace FASTSEG_ISA
}  // namespace fastseg

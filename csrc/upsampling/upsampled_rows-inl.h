// How the upsampling operators' kernels see their input. The output is cut into bands of rows, and a band into tiles of
// columns, so that two input rows, expanded to the tile's columns, stay in cache: [classes][columns] each. An output
// row is then a weighted sum of two expanded rows, vector by vector along the columns, whatever the ratio of the sizes;
// and the expansion itself is shared by all output rows between the same two input rows.
//
// A volume is planes of rows: an output plane is the upsampling of a weighted sum of two input planes, of which a row
// is made when it is expanded. So it is interpolated along its depth, then its width, then its height; an image is a
// volume of one plane, which nothing is added to.
#pragma once

#include "core/cache.h"
#include "core/integers.h"
#include "core/parallel.h"
#include "simd/pack-inl.h"
#include "simd/vector_math-inl.h"
#include "upsampling/upsampling.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

enum class Axis : int { kPlanes, kRows, kColumns };  // of Upsampling.step

// Two input positions along an axis, and how much each counts.
template <class T>
struct Position {
  int64_t first, second;
  T first_weight, second_weight;
};

template <class T>
Position<T> locate(const Upsampling& grid, Axis axis, int64_t output, int64_t input_size, int64_t output_size) {
  const double step = grid.step[static_cast<int>(axis)];
  if (grid.mode == Mode::kNearest) {
    // In single precision, as torch does for every dtype: the floor jumps where the product's rounding does.
    const int64_t source = static_cast<int64_t>(static_cast<float>(output) * static_cast<float>(step));
    const int64_t nearest = min_of(source, input_size - 1);
    return {nearest, nearest, T(1), T(0)};
  }
  if (input_size == output_size) return {output, output, T(1), T(0)};
  const double place = static_cast<double>(output);
  double source = grid.align_corners ? step * place : step * (place + 0.5) - 0.5;
  if (source < 0) source = 0;
  const int64_t first = min_of(static_cast<int64_t>(source), input_size - 1);
  double fraction = source - static_cast<double>(first);
  if (fraction > 1) fraction = 1;
  return {first, first + (first < input_size - 1), static_cast<T>(1 - fraction), static_cast<T>(fraction)};
}

// The columns' positions, one array for each part of them, repeating the last column up to kPixelMultiple.
template <class T>
struct Columns {
  int64_t count;                  // without the repeated ones
  Int<T>* left;                   // the first input column
  Int<T>* lane;                   // left, counted from that of the vector's first column
  T *left_weight, *right_weight;  // the right input column is the next one, or where there is none the same
  bool blends;                    // whether right columns count at all
  bool permutes;                  // whether every vector's left columns lie within a vector

  static int64_t bytes(int64_t count) { return 4 * round_up(count, kPixelMultiple) * static_cast<int64_t>(sizeof(T)); }

  Columns(const Upsampling& grid, int64_t input_size, int64_t output_size, void* memory)
      : count(output_size),
        left(static_cast<Int<T>*>(memory)),
        lane(left + round_up(count, kPixelMultiple)),
        left_weight(reinterpret_cast<T*>(lane + round_up(count, kPixelMultiple))),
        right_weight(left_weight + round_up(count, kPixelMultiple)),
        blends(grid.mode == Mode::kLinear),
        permutes(true) {
    for (int64_t x = 0; x < round_up(count, kPixelMultiple); ++x) {
      const Position<T> position = locate<T>(grid, Axis::kColumns, min_of(x, count - 1), input_size, output_size);
      left[x] = static_cast<Int<T>>(position.first);
      lane[x] = left[x] - left[x / kLanes<T> * kLanes<T>];
      left_weight[x] = position.first_weight;
      right_weight[x] = position.second_weight;
      permutes = permutes && lane[x] < kLanes<T>;
    }
  }
};

// A call's sizes and tables, which its tasks share.
template <class T>
struct UpsampledMap {
  Upsampling grid;
  bool is_volume;
  int64_t images, classes, depth, height, width;  // of the input
  int64_t output_depth, output_height, output_width;
  bool blends_planes;
  int64_t tile_columns;   // of the output
  int64_t row_stride;     // from one class to the next in a tile's rows
  int64_t source_stride;  // the same in the input's rows that a tile is made of
  Workspace tables;
  Columns<T> columns;
  Position<T>*rows, *planes;  // [output_height], [output_depth]

  // output: a tensor whose last dimensions are those that input's become. rows_in_cache: how many rows [classes]
  // [columns] a tile's work goes over.
  UpsampledMap(const Upsampling& upsampling, const Tensor& input, const Tensor& output, int64_t rows_in_cache)
      : grid(upsampling),
        is_volume(input.ndim == 5),
        images(input.size[0]),
        classes(input.size[1]),
        depth(is_volume ? input.size[2] : 1),
        height(input.size[input.ndim - 2]),
        width(input.size[input.ndim - 1]),
        output_depth(is_volume ? output.size[output.ndim - 3] : 1),
        output_height(output.size[output.ndim - 2]),
        output_width(output.size[output.ndim - 1]),
        blends_planes(is_volume && upsampling.mode == Mode::kLinear),
        tables(Columns<T>::bytes(output_width) +
               (output_height + output_depth) * static_cast<int64_t>(sizeof(Position<T>))),
        columns(upsampling, width, output_width, tables.data()),
        rows(reinterpret_cast<Position<T>*>(static_cast<char*>(tables.data()) + Columns<T>::bytes(output_width))),
        planes(rows + output_height) {
    const int64_t fitting = kUpsampledRowsBytes / (rows_in_cache * classes * static_cast<int64_t>(sizeof(T)));
    tile_columns = max_of(fitting / kPixelMultiple, 1) * kPixelMultiple;
    tile_columns = min_of(tile_columns, round_up(output_width, kPixelMultiple));
    row_stride = tile_columns + kRowPadding;
    int64_t span = 0;
    for (int64_t x = 0; x < output_width; x += tile_columns)
      span = max_of(span, columns.left[min_of(x + tile_columns, output_width) - 1] - columns.left[x] + 1);
    source_stride = span + 1 + kLanes<T>;  // the next column, and what a vector may read beyond it
    for (int64_t y = 0; y < output_height; ++y) rows[y] = locate<T>(grid, Axis::kRows, y, height, output_height);
    for (int64_t z = 0; z < output_depth; ++z) planes[z] = locate<T>(grid, Axis::kPlanes, z, depth, output_depth);
  }

  // Of all images.
  int64_t output_planes() const { return images * output_depth; }
  int64_t output_pixels() const { return output_planes() * output_height * output_width; }

  // Of a row, in the input or a tensor of its shape.
  int64_t input_offset(const Tensor& input, int64_t image, int64_t z, int64_t y) const {
    return image * input.stride[0] + (is_volume ? z * input.stride[2] : 0) + y * input.stride[input.ndim - 2];
  }

  // Of an output pixel, in a tensor of any strides: [N, H, W], or of a volume [N, D, H, W].
  int64_t offset_of(const Tensor& pixels, int64_t plane, int64_t y, int64_t x) const {
    const int64_t* const stride = pixels.stride;
    const int64_t image = plane / output_depth, z = plane % output_depth;
    return image * stride[0] + (is_volume ? z * stride[1] : 0) + y * stride[pixels.ndim - 2] +
           x * stride[pixels.ndim - 1];
  }

  int64_t row_elements() const { return classes * row_stride; }
  int64_t source_elements() const { return classes * source_stride * (1 + blends_planes); }
};

template <class T>
FASTSEG_INLINE Vec<T> permute(Vec<T> v, IntVec<T> lanes) {
#if defined(__clang__)
  Vec<T> result;
  for (int i = 0; i < kLanes<T>; ++i) result[i] = v[lanes[i]];
  return result;
#else
  return __builtin_shuffle(v, lanes);
#endif
}

// The input rows of a tile, expanded to its columns.
template <class T>
class ExpandedRows {
 public:
  static int64_t elements(const UpsampledMap<T>& map) { return map.source_elements() + 2 * map.row_elements(); }

  // relative: every pixel of the input is taken relative to its largest logit.
  ExpandedRows(const UpsampledMap<T>& map, const Tensor& input, bool relative, T* memory)
      : map_(map),
        input_(input),
        relative_(relative),
        source_(memory),
        rows_{memory + map.source_elements(), memory + map.source_elements() + map.row_elements()} {
    memset(source_, 0, map.source_elements() * sizeof(T));
  }

  // The tile that the next calls of row() are about: columns [begin, begin + count) of an output plane.
  void select(int64_t plane, int64_t begin, int64_t count) {
    image_ = plane / map_.output_depth;
    planes_ = map_.planes[plane % map_.output_depth];
    begin_ = begin;
    padded_ = round_up(count, kPixelMultiple);
    first_ = map_.columns.left[begin];
    const int64_t last = map_.columns.left[begin + count - 1];
    span_ = min_of(last + 2, map_.width) - first_;
    repeats_last_ = last == map_.width - 1;
    held_[0] = held_[1] = -1;
  }

  // An input row, [classes][row_stride].
  const T* row(int64_t y) {
    T* const expanded = rows_[y % 2];
    if (held_[y % 2] == y) return expanded;
    held_[y % 2] = y;
    pack_row(planes_.first, y, source_);
    if (map_.blends_planes) blend_planes(y);
    if (repeats_last_)
      for (int64_t c = 0; c < map_.classes; ++c) {
        T* const source = source_ + c * map_.source_stride;
        source[span_] = source[span_ - 1];
      }
    if (relative_)
      subtract_largest();
    else
      may_be_nan_[y % 2] = holds_extremes();
    expand(expanded);
    return expanded;
  }

  // Whether a blend of row y, the last that row() gave in its place, may be NaN. Not known of relative rows.
  bool may_be_nan(int64_t y) const { return may_be_nan_[y % 2]; }

 private:
  const UpsampledMap<T>& map_;
  const Tensor& input_;
  const bool relative_;
  T* source_;
  T* rows_[2];
  Position<T> planes_ = {};
  int64_t image_ = 0, begin_ = 0, padded_ = 0, first_ = 0, span_ = 0;
  bool repeats_last_ = false;
  int64_t held_[2] = {-1, -1};
  bool may_be_nan_[2] = {true, true};

  void pack_row(int64_t z, int64_t y, T* target) const {
    const int64_t column_stride = input_.stride[input_.ndim - 1];
    const int64_t offset = map_.input_offset(input_, image_, z, y) + first_ * column_stride;
    pack(at(input_, offset), input_.dtype, map_.classes, span_, input_.stride[1], column_stride, target,
         map_.source_stride);
  }

  // Makes of a row of the first plane that of both.
  void blend_planes(int64_t y) {
    T* const second = source_ + map_.classes * map_.source_stride;
    pack_row(planes_.second, y, second);
    for (int64_t c = 0; c < map_.classes; ++c)
      for (int64_t x = c * map_.source_stride; x < c * map_.source_stride + span_; x += kLanes<T>)
        store(source_ + x, load(source_ + x) * planes_.first_weight + load(second + x) * planes_.second_weight);
  }

  // Whether any logit is NaN, infinite, or so large that a weighted sum might be.
  bool holds_extremes() const {
    const Vec<T> bound = broadcast<T>(kLargestFinite<T> / 4);
    IntVec<T> ordinary = bound == bound;
    for (int64_t c = 0; c < map_.classes; ++c)
      for (int64_t x = 0; x <= span_; x += kLanes<T>) {
        const Vec<T> logit = load(source_ + c * map_.source_stride + x);
        ordinary &= (logit <= bound) & (logit >= -bound);
      }
    return any<T>(~ordinary);
  }

  // Logits relative to their pixel's largest.
  void subtract_largest() {
    const int64_t stride = map_.source_stride;
    for (int64_t x = 0; x <= span_; x += kLanes<T>) {
      Vec<T> largest = load(source_ + x);
      for (int64_t c = 1; c < map_.classes; ++c) largest = maximum<T>(largest, load(source_ + c * stride + x));
      for (int64_t c = 0; c < map_.classes; ++c)
        store(source_ + c * stride + x, load(source_ + c * stride + x) - largest);
    }
  }

  // All classes of a vector of columns after each other: they share its columns' positions and weights.
  void expand(T* expanded) const {
    const Columns<T>& columns = map_.columns;
    const int64_t classes = map_.classes, source_stride = map_.source_stride, row_stride = map_.row_stride;
    const Int<T>* const left = columns.left + begin_;
    const T *left_weights = columns.left_weight + begin_, *right_weights = columns.right_weight + begin_;
    const int64_t right = map_.width == map_.output_width ? 0 : 1;  // then it is the left one, as in torch
    if (!columns.permutes) {
      for (int64_t c = 0; c < classes; ++c)
        for (int64_t x = 0; x < padded_; ++x) {
          const T* const source = source_ + c * source_stride + (left[x] - first_);
          expanded[c * row_stride + x] =
              columns.blends ? source[0] * left_weights[x] + source[1] * right_weights[x] : source[0];
        }
      return;
    }
    for (int64_t x = 0; x < padded_; x += kLanes<T>) {
      const T* source = source_ + (left[x] - first_);
      T* target = expanded + x;
      IntVec<T> lanes;
      memcpy(&lanes, columns.lane + begin_ + x, sizeof lanes);
      const Vec<T> left_weight = load(left_weights + x), right_weight = load(right_weights + x);
      if (columns.blends)
#pragma GCC unroll 4
        for (int64_t c = 0; c < classes; ++c, source += source_stride, target += row_stride)
          store(target,
                permute<T>(load(source), lanes) * left_weight + permute<T>(load(source + right), lanes) * right_weight);
      else
#pragma GCC unroll 4
        for (int64_t c = 0; c < classes; ++c, source += source_stride, target += row_stride)
          store(target, permute<T>(load(source), lanes));
    }
  }
};

// An output row's two expanded input rows, and how much each counts; second is null where the first is all.
template <class T>
struct RowPair {
  const T *first, *second;
  T first_weight, second_weight;
  bool may_be_nan;

  RowPair(const UpsampledMap<T>& map, ExpandedRows<T>* source, const Position<T>& position)
      : first(source->row(position.first)),
        second(map.grid.mode == Mode::kNearest ? nullptr : source->row(position.second)),
        first_weight(position.first_weight),
        second_weight(position.second_weight),
        may_be_nan(source->may_be_nan(position.first) || source->may_be_nan(position.second)) {}
};

// An output row's logits, a vector at a time.
template <class T, bool kBlends>
class UpsampledRow {
 public:
  UpsampledRow(const RowPair<T>& pair, int64_t class_stride, int64_t begin)
      : first_(pair.first + begin),
        second_(kBlends ? pair.second + begin : nullptr),
        class_stride_(class_stride),
        first_weight_(broadcast<T>(pair.first_weight)),
        second_weight_(broadcast<T>(pair.second_weight)) {}

  FASTSEG_INLINE Vec<T> operator()(int64_t c, int64_t x) const {
    const int64_t offset = c * class_stride_ + x;
    if (!kBlends) return load(first_ + offset);
    return load(first_ + offset) * first_weight_ + load(second_ + offset) * second_weight_;
  }

  FASTSEG_INLINE T at(int64_t c, int64_t x) const {
    const int64_t offset = c * class_stride_ + x;
    if (!kBlends) return first_[offset];
    return first_[offset] * first_weight_[0] + second_[offset] * second_weight_[0];
  }

 private:
  const T *first_, *second_;
  int64_t class_stride_;
  Vec<T> first_weight_, second_weight_;
};

// Calls body(row) with the row's logits from column `begin` of the tile on.
template <class T, class Body>
void with_upsampled_row(const UpsampledMap<T>& map, const RowPair<T>& pair, int64_t begin, Body body) {
  if (pair.second == nullptr)
    body(UpsampledRow<T, false>(pair, map.row_stride, begin));
  else
    body(UpsampledRow<T, true>(pair, map.row_stride, begin));
}

}  // namespace
}  // namespace FASTSEG_ISA
}  // namespace fastseg

// How the upsampling operators' kernels see their input: rows of pixels with all classes of a pixel side by side, so
// that an upsampled pixel is a weighted sum of two such pixels, class vector by class vector, whatever the ratio of the
// sizes.
//
// An input row is packed so once for a band of output rows; an output row's two input rows are blended; and the output
// pixels between the same two input columns (a cell) are made together.
#pragma once

#include "integers.h"
#include "pack.h"
#include "parallel.h"
#include "upsampling.h"
#include "vector_math.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

// Two input positions along an axis, and how much each counts.
template <class T>
struct Position {
  int64_t first, second;
  T first_weight, second_weight;
};

template <class T>
Position<T> locate(const Upsampling& grid, int axis, int64_t output, int64_t input_size, int64_t output_size) {
  const double step = grid.step[axis];
  if (grid.mode == Mode::kNearest) {
    // In single precision, as torch does for every dtype: the floor jumps where the product's rounding does.
    const int64_t source = static_cast<int64_t>(static_cast<float>(output) * static_cast<float>(step));
    const int64_t nearest = least(source, input_size - 1);
    return {nearest, nearest, T(1), T(0)};
  }
  if (input_size == output_size) return {output, output, T(1), T(0)};
  const double place = static_cast<double>(output);
  double source = grid.align_corners ? step * place : step * (place + 0.5) - 0.5;
  if (source < 0) source = 0;
  const int64_t first = least(static_cast<int64_t>(source), input_size - 1);
  double fraction = source - static_cast<double>(first);
  if (fraction > 1) fraction = 1;
  return {first, first + (first < input_size - 1), static_cast<T>(1 - fraction), static_cast<T>(fraction)};
}

// Neighbouring output pixels, at most kMaxCell of them, between the same two input pixels.
constexpr int kMaxCell = 4;

struct Cell {
  int64_t begin;
  int count;
  int64_t left, right;  // offsets of the input pixels in a row, in elements
};

// A call's sizes and tables; the tables are shared by its tasks.
template <class T>
struct UpsampledMap {
  Upsampling grid;
  int64_t classes, height, width, output_height, output_width;  // height, width: of the input
  int64_t pixel;                                                // elements from one pixel of a row to the next
  int64_t row;                                                  // elements of a row
  Position<T>* rows;                                            // [output_height]
  Cell* cells;
  int64_t cell_count;
  T *left_weight, *right_weight;  // [output_width]

  int64_t vectors() const { return pixel / kLanes<T>; }

  static int64_t table_bytes(int64_t output_height, int64_t output_width) {
    return output_height * sizeof(Position<T>) + output_width * (sizeof(Cell) + 2 * sizeof(T));
  }

  UpsampledMap(const Upsampling& upsampling, const Tensor& input, int64_t to_height, int64_t to_width, void* tables)
      : grid(upsampling),
        classes(input.size[1]),
        height(input.size[2]),
        width(input.size[3]),
        output_height(to_height),
        output_width(to_width),
        pixel(round_up(input.size[1], kLanes<T>)),
        row((input.size[3] + 1) * pixel),  // one more pixel, of zeros
        rows(static_cast<Position<T>*>(tables)),
        cells(reinterpret_cast<Cell*>(rows + to_height)),
        cell_count(0),
        left_weight(reinterpret_cast<T*>(cells + to_width)),
        right_weight(left_weight + to_width) {
    for (int64_t y = 0; y < output_height; ++y) rows[y] = locate<T>(grid, 0, y, height, output_height);
    for (int64_t x = 0; x < output_width; ++x) {
      const Position<T> position = locate<T>(grid, 1, x, width, output_width);
      // The nearest pixel is blended with the zeros: an infinity times the other weight, zero, would be NaN.
      const int64_t second = grid.mode == Mode::kNearest ? width : position.second;
      const Cell cell = {x, 1, position.first * pixel, second * pixel};
      left_weight[x] = position.first_weight;
      right_weight[x] = position.second_weight;
      Cell* last = cell_count > 0 ? &cells[cell_count - 1] : nullptr;
      if (last != nullptr && last->left == cell.left && last->right == cell.right && last->count < kMaxCell)
        ++last->count;
      else
        cells[cell_count++] = cell;
    }
  }
};

// The rows of one image, packed and blended in a thread's scratch memory.
template <class T>
class SourceRows {
 public:
  static int64_t elements(const UpsampledMap<T>& map) { return 3 * map.row; }

  SourceRows(const UpsampledMap<T>& map, const Tensor& input, int64_t image, T* memory)
      : map_(map), input_(input), image_(image), packed_{memory, memory + map.row}, blended_(memory + 2 * map.row) {
    T* const rows[] = {packed_[0], packed_[1], blended_};
    for (T* row : rows) memset(row + map.width * map.pixel, 0, map.pixel * sizeof(T));
  }

  // The input as the output row sees it, [width + 1][pixel]: classes, their last one repeated, and a pixel of zeros.
  const T* at_output(int64_t y) {
    const Position<T>& position = map_.rows[y];
    const T* first = packed(position.first);
    if (map_.grid.mode == Mode::kNearest) return first;
    const T* second = packed(position.second);
    const Vec<T> first_weight = broadcast<T>(position.first_weight);
    const Vec<T> second_weight = broadcast<T>(position.second_weight);
    for (int64_t i = 0; i < map_.width * map_.pixel; i += kLanes<T>)
      store(blended_ + i, load(first + i) * first_weight + load(second + i) * second_weight);
    return blended_;
  }

 private:
  const UpsampledMap<T>& map_;
  const Tensor& input_;
  const int64_t image_;
  T* packed_[2];
  T* blended_;
  int64_t held_[2] = {-1, -1};

  const T* packed(int64_t y) {
    T* const row = packed_[y % 2];
    if (held_[y % 2] == y) return row;
    held_[y % 2] = y;
    pack(at(input_, image_ * input_.stride[0] + y * input_.stride[2]), input_.dtype, map_.width, map_.classes,
         input_.stride[3], input_.stride[1], row, map_.pixel);
    for (int64_t x = 0; x < map_.width; ++x)
      for (int64_t c = map_.classes; c < map_.pixel; ++c)
        row[x * map_.pixel + c] = row[x * map_.pixel + map_.classes - 1];
    return row;
  }
};

// ---- work ----

// Bands of output rows, none across two images, by the shape alone: sums over a band don't depend on who computes it.
constexpr int64_t kBands = 64;         // enough for the threads of a large machine
constexpr int64_t kLeastBandRows = 4;  // of the output: packing input rows is to be shared

struct Bands {
  int64_t rows, per_image, count;

  Bands(int64_t images, int64_t output_height)
      : rows(most(ceil_div(images * output_height, kBands), kLeastBandRows)),
        per_image(ceil_div(output_height, rows)),
        count(images * per_image) {}
};

// Pieces of a thread's scratch memory, each on a cache line of its own.
template <class T>
class Pieces {
 public:
  explicit Pieces(void* memory) : next_(static_cast<T*>(memory)) {}
  static int64_t padded(int64_t elements) { return round_up(elements, 64 / sizeof(T)); }
  T* take(int64_t elements) {
    T* piece = next_;
    next_ += padded(elements);
    return piece;
  }

 private:
  T* next_;
};

// ---- pixels ----

// The number of a vector's lanes that hold classes in the last vector of a pixel.
template <class T>
struct LastVector {
  alignas(64) Int<T> mask[kLanes<T>];  // all ones where there is a class

  explicit LastVector(int64_t classes) {
    const int64_t whole = (classes - 1) / kLanes<T> * kLanes<T>;
    for (int lane = 0; lane < kLanes<T>; ++lane) mask[lane] = whole + lane < classes ? ~Int<T>(0) : Int<T>(0);
  }
  IntVec<T> vector() const {
    IntVec<T> v;
    memcpy(&v, mask, sizeof v);
    return v;
  }
};

template <class T>
FASTSEG_INLINE T largest_of(Vec<T> v) {
  T lanes[kLanes<T>];
  memcpy(lanes, &v, sizeof v);
  for (int step = kLanes<T> / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] = lanes[i] > lanes[i + step] ? lanes[i] : lanes[i + step];
  return lanes[0];
}

template <class T>
FASTSEG_INLINE T sum_of(Vec<T> v) {
  T lanes[kLanes<T>];
  memcpy(lanes, &v, sizeof v);
  for (int step = kLanes<T> / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
}

// logits[k * pixel + c] of a cell's pixels, and the largest of each.
template <class T, int Count>
FASTSEG_INLINE void upsample_cell(const UpsampledMap<T>& map, const Cell& cell, const T* row, T* logits, T* largest) {
  const T *left = row + cell.left, *right = row + cell.right;
  Vec<T> left_weight[Count], right_weight[Count], best[Count];
  for (int k = 0; k < Count; ++k) {
    left_weight[k] = broadcast<T>(map.left_weight[cell.begin + k]);
    right_weight[k] = broadcast<T>(map.right_weight[cell.begin + k]);
    best[k] = load(left) * left_weight[k] + load(right) * right_weight[k];
  }
  for (int64_t c = 0; c < map.pixel; c += kLanes<T>) {
    const Vec<T> a = load(left + c), b = load(right + c);
    for (int k = 0; k < Count; ++k) {
      const Vec<T> logit = a * left_weight[k] + b * right_weight[k];
      store(logits + k * map.pixel + c, logit);
      best[k] = maximum<T>(best[k], logit);
    }
  }
  for (int k = 0; k < Count; ++k) largest[k] = largest_of<T>(best[k]);
}

template <class T>
void upsample_cell(const UpsampledMap<T>& map, const Cell& cell, const T* row, T* logits, T* largest) {
  switch (cell.count) {
    case 1:
      return upsample_cell<T, 1>(map, cell, row, logits, largest);
    case 2:
      return upsample_cell<T, 2>(map, cell, row, logits, largest);
    case 3:
      return upsample_cell<T, 3>(map, cell, row, logits, largest);
    default:
      return upsample_cell<T, kMaxCell>(map, cell, row, logits, largest);
  }
}

}  // namespace
}  // namespace FASTSEG_ISA
}  // namespace fastseg

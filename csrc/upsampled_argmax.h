// The class of the largest logit of each pixel of an upsampled row: the part that upsample_argmax and
// upsample_confusion_matrix share.
#pragma once

#include "upsampled_rows.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

// Of one lane's candidates the first largest one, or the first NaN.
template <class T>
struct Best {
  Vec<T> value;
  IntVec<T> index;

  FASTSEG_INLINE void take(Vec<T> candidate, IntVec<T> candidate_index) {
    // A NaN is neither smaller nor equal; once it is held, nothing replaces it.
    const IntVec<T> better = ~(candidate <= value) & (value == value);
    value = better ? candidate : value;
    index = better ? candidate_index : index;
  }

  // Of all lanes: of equal values the smallest index, as a lane's own are in ascending order.
  FASTSEG_INLINE Int<T> first() const {
    T values[kLanes<T>];
    Int<T> indices[kLanes<T>];
    memcpy(values, &value, sizeof value);
    memcpy(indices, &index, sizeof index);
    int best = 0;
    for (int lane = 1; lane < kLanes<T>; ++lane) {
      const bool is_nan = values[lane] != values[lane], best_is_nan = values[best] != values[best];
      const bool equal = values[lane] == values[best] || (is_nan && best_is_nan);
      const bool larger = values[lane] > values[best] || (is_nan && !best_is_nan);
      if (larger || (equal && indices[lane] < indices[best])) best = lane;
    }
    return indices[best];
  }
};

template <class T, int Count>
FASTSEG_INLINE void argmax_cell(const UpsampledMap<T>& map, const Cell& cell, const T* row, Int<T>* labels) {
  const T *left = row + cell.left, *right = row + cell.right;
  Vec<T> left_weight[Count], right_weight[Count];
  Best<T> best[Count];
  IntVec<T> index;
  for (int lane = 0; lane < kLanes<T>; ++lane) index[lane] = lane;
  for (int k = 0; k < Count; ++k) {
    left_weight[k] = broadcast<T>(map.left_weight[cell.begin + k]);
    right_weight[k] = broadcast<T>(map.right_weight[cell.begin + k]);
    best[k] = {load(left) * left_weight[k] + load(right) * right_weight[k], index};
  }
  for (int64_t c = kLanes<T>; c < map.pixel; c += kLanes<T>) {
    index += kLanes<T>;
    const Vec<T> a = load(left + c), b = load(right + c);
    for (int k = 0; k < Count; ++k) best[k].take(a * left_weight[k] + b * right_weight[k], index);
  }
  // Lanes beyond the classes repeat the last class, whose own index is smaller.
  for (int k = 0; k < Count; ++k) labels[cell.begin + k] = best[k].first();
}

template <class T>
void argmax_row(const UpsampledMap<T>& map, const T* row, Int<T>* labels) {
  for (int64_t i = 0; i < map.cell_count; ++i) {
    const Cell& cell = map.cells[i];
    switch (cell.count) {
      case 1:
        argmax_cell<T, 1>(map, cell, row, labels);
        break;
      case 2:
        argmax_cell<T, 2>(map, cell, row, labels);
        break;
      case 3:
        argmax_cell<T, 3>(map, cell, row, labels);
        break;
      default:
        argmax_cell<T, kMaxCell>(map, cell, row, labels);
    }
  }
}

}  // namespace
}  // namespace FASTSEG_ISA
}  // namespace fastseg

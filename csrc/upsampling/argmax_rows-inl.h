// The class of the largest logit of each pixel of an upsampled row: what the predictions of classes share.
#pragma once

#include "upsampling/output_bands-inl.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

constexpr int kArgmaxRowsInCache = 2;  // a tile's two expanded input rows

// labels[x] = the first class of the largest logit, or of the first NaN, for a tile's columns [0, count), up to
// kPixelMultiple beyond them. kMayBeNan: whether there is any.
template <class T, bool kMayBeNan, class Row>
FASTSEG_NOINLINE void argmax_columns(int64_t classes, const Row logits, int64_t count, Int<T>* labels) {
  // Independent of each other, to fill the pipelines; whole blocks of columns.
  constexpr int kVectors = kPixelMultiple < 4 * kLanes<T> ? kPixelMultiple / kLanes<T> : 4;
  for (int64_t x = 0; x < count; x += kVectors * kLanes<T>) {
    Vec<T> best[kVectors];
    IntVec<T> label[kVectors] = {}, candidate = {};
    for (int i = 0; i < kVectors; ++i) best[i] = logits(0, x + i * kLanes<T>);
    for (int64_t c = 1; c < classes; ++c) {
      candidate += 1;
      for (int i = 0; i < kVectors; ++i) {
        const Vec<T> logit = logits(c, x + i * kLanes<T>);
        if (kMayBeNan) {  // it is neither smaller nor equal; once it is held, nothing replaces it
          const IntVec<T> better = ~(logit <= best[i]) & (best[i] == best[i]);
          best[i] = better ? logit : best[i];
          label[i] = better ? candidate : label[i];
        } else {
          label[i] = logit > best[i] ? candidate : label[i];
          best[i] = maximum<T>(logit, best[i]);
        }
      }
    }
    for (int i = 0; i < kVectors; ++i) memcpy(labels + x + i * kLanes<T>, &label[i], sizeof label[i]);
  }
}

template <class T, class Row>
void argmax_row(const UpsampledMap<T>& map, const RowPair<T>& pair, const Row logits, int64_t count, Int<T>* labels) {
  if (pair.may_be_nan)
    argmax_columns<T, true>(map.classes, logits, count, labels);
  else
    argmax_columns<T, false>(map.classes, logits, count, labels);
}

// Labels to target, which is dense, from its element `first` on.
template <class I>
void store_labels(const I* labels, int64_t count, const Tensor& target, int64_t first) {
  const auto to = [&](auto* typed) {
    for (int64_t x = 0; x < count; ++x) typed[first + x] = static_cast<decltype(typed[0] + 0)>(labels[x]);
  };
  if (target.dtype == DType::kUInt8) to(static_cast<uint8_t*>(target.data));
  if (target.dtype == DType::kInt16) to(static_cast<int16_t*>(target.data));
  if (target.dtype == DType::kInt32) to(static_cast<int32_t*>(target.data));
  if (target.dtype == DType::kInt64) to(static_cast<int64_t*>(target.data));
}

}  // namespace
}  // namespace FASTSEG_ISA
}  // namespace fastseg

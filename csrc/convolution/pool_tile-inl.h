// Max pooling of rows that lie in cache, a block of channels at a time: the end of both algorithms of conv_relu_pool2d.
#pragma once

#include "convolution/conv_tile-inl.h"
#include "convolution/register_tile-inl.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

// The maximum of a window of Rows x Columns positions (zero: their number comes as an argument), ReLU after it.
// rows[i] points to the window's first column in row i; positions count from `first` with `pitch` to a row.
template <class T, int Rows, int Columns>
FASTSEG_INLINE void pool_window(const T* const* rows, int64_t offset, int64_t column_step, int64_t row_count,
                                int64_t column_count, Int<T> first, Int<T> pitch, T* value, Int<T>* position) {
  Vec<T> best = load(rows[0] + offset);
  IntVec<T> where = first - IntVec<T>{};
  for (int64_t i = 0; i < (Rows > 0 ? Rows : row_count); ++i) {
    for (int64_t j = i == 0 ? 1 : 0; j < (Columns > 0 ? Columns : column_count); ++j) {
      const Vec<T> candidate = load(rows[i] + offset + j * column_step);
      // Strictly greater, so that the first of equal maxima stays; NaN always wins, as in torch.
      const IntVec<T> better = (candidate > best) | (candidate != candidate);
      best = better ? candidate : best;
      where = better ? (first + static_cast<Int<T>>(i) * pitch + static_cast<Int<T>>(j)) - IntVec<T>{} : where;
    }
  }
  const IntVec<T> cut = best <= Vec<T>{};
  store<T>(value, cut ? Vec<T>{} : best);
  where = cut ? kCut - IntVec<T>{} : where;
  memcpy(position, &where, sizeof where);
}

// Pools one row of windows: rows[i] is the convolution's row span.begin + i, `block` channels of [width] columns that
// lie `block` elements apart; values and positions are [pooled_w][block]. `block` is a multiple of the vector.
template <class T>
void pool_row(const T* const* rows, Span span, int64_t window_row, int64_t width, const ConvPoolGeometry& g,
              int64_t pooled_w, int64_t block, T* values, Int<T>* positions) {
  const int64_t window_top = window_row * g.pool_stride[0] - g.pool_padding[0];
  const Int<T> pitch = static_cast<Int<T>>(g.pool_size[1]);
  for (int64_t p = 0; p < pooled_w; ++p) {
    const Span columns = window_span(g, 1, p, width);
    const int64_t window_left = p * g.pool_stride[1] - g.pool_padding[1];
    const Int<T> first = static_cast<Int<T>>((span.begin - window_top) * g.pool_size[1] + columns.begin - window_left);
    for (int64_t lane = 0; lane < block; lane += kLanes<T>) {
      const int64_t offset = columns.begin * block + lane;
      T* value = values + p * block + lane;
      Int<T>* position = positions + p * block + lane;
      if (span.size() == 2 && columns.size() == 2) {
        pool_window<T, 2, 2>(rows, offset, block, 2, 2, first, pitch, value, position);
      } else if (span.size() == 3 && columns.size() == 3) {
        pool_window<T, 3, 3>(rows, offset, block, 3, 3, first, pitch, value, position);
      } else {
        pool_window<T, 0, 0>(rows, offset, block, span.size(), columns.size(), first, pitch, value, position);
      }
    }
  }
}

// Writes a row of pooled values and positions, [pooled_w][block], to channels [channel, channel + count) of the
// outputs.
template <class T>
void unpack_pooled(const T* values, const Int<T>* positions, int64_t block, int64_t image, int64_t channel,
                   int64_t count, int64_t row, const Tensor& output, const Tensor& positions_out) {
  const auto offset = [&](const Tensor& t) { return image * t.stride[0] + channel * t.stride[1] + row * t.stride[2]; };
  unpack(values, block, output.size[3], count, at_mutable(output, offset(output)), output.dtype, output.stride[3],
         output.stride[1]);
  if (!positions_out) return;
  unpack_to(positions, block, output.size[3], count, static_cast<uint8_t*>(positions_out.data) + offset(positions_out),
            positions_out.stride[3], positions_out.stride[1]);
}

}  // namespace
}  // namespace FASTSEG_ISA
}  // namespace fastseg

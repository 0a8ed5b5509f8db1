// The innermost loop of the convolutions: a tile of a matrix product that stays in registers.
#pragma once

#include "simd/simd-inl.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

// Channels are worked on in blocks of two vectors; a rest of one vector or less in a block of one.
template <class T>
constexpr int kBlock = 2 * kLanes<T>;
template <class T>
int vectors_of(int64_t channels, int64_t block) {
  return channels - block * kBlock<T> > kLanes<T> ? 2 : 1;
}

// Accumulators of the innermost loop. With the weights' two vectors and a broadcast they fill the register file.
#if FASTSEG_VECTOR_BYTES == 64
constexpr int kAccumulators = 24;  // of 32 registers
#else
constexpr int kAccumulators = 12;  // of 16 registers
#endif
template <int Vectors>
constexpr int kPixels = kAccumulators / Vectors;
constexpr int kWidestTile = kPixels<1>;

// Where the terms of a sum lie: chunks of `length` neighbours.
struct Terms {
  const int64_t* chunks;  // offsets
  int64_t count, length;
};

// kPixels rows x Vectors vectors of columns: target[p] = start + sum over terms of rows[p * step + term] *
// columns[term], or what target[p] was in place of the start. Per term: one load per vector of columns, one broadcast
// per row, and their products.
template <class T, int Vectors, bool Adds = false>
FASTSEG_INLINE void multiply_tile(const T* rows, int64_t step, const Terms& terms, const T* columns,
                                  const Vec<T> (&start)[Vectors], T* target) {
  constexpr int kWidth = kPixels<Vectors>, kHalf = kWidth / 2;
  Vec<T> sum[kWidth][Vectors];
#pragma GCC unroll 24
  for (int p = 0; p < kWidth; ++p)
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) sum[p][v] = Adds ? load(target + (p * Vectors + v) * kLanes<T>) : start[v];
  for (int64_t chunk = 0; chunk < terms.count; ++chunk) {
    // Two pointers: an address reaches three of the rows by adding a multiple of `step` that a register holds.
    const T* low = rows + terms.chunks[chunk];
    const T* high = low + kHalf * step;
#pragma GCC unroll 2
    for (int64_t i = 0; i < terms.length; ++i, ++low, ++high, columns += Vectors * kLanes<T>) {
      Vec<T> column[Vectors];
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) column[v] = load(columns + v * kLanes<T>);
#pragma GCC unroll 24
      for (int p = 0; p < kWidth; ++p) {
        const Vec<T> row = broadcast(p < kHalf ? low[p * step] : high[(p - kHalf) * step]);
#pragma GCC unroll 2
        for (int v = 0; v < Vectors; ++v) sum[p][v] += row * column[v];
      }
    }
  }
#pragma GCC unroll 24
  for (int p = 0; p < kWidth; ++p)
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) store(target + (p * Vectors + v) * kLanes<T>, sum[p][v]);
}

}  // namespace
}  // namespace FASTSEG_ISA
}  // namespace fastseg

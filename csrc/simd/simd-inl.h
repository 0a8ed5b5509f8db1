// The vector type of the instruction set that this file is compiled for, on the compiler's own vector extensions:
// one source for SSE2, AVX2, AVX-512 and NEON. Included only by kernel files, inside no namespace of theirs.
#pragma once

#include <stdint.h>
#include <string.h>

#ifndef FASTSEG_ISA
#error "kernel files are compiled once for each instruction set, with -DFASTSEG_ISA=<its name>"
#endif

#if defined(__AVX512F__)
#define FASTSEG_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FASTSEG_VECTOR_BYTES 32
#else
#define FASTSEG_VECTOR_BYTES 16
#endif

#define FASTSEG_INLINE inline __attribute__((always_inline))
#define FASTSEG_NOINLINE __attribute__((noinline))  // so that a hot loop gets all registers

namespace fastseg {
namespace FASTSEG_ISA {
namespace {  // internal linkage: the linker must never pick one instruction set's copy for another

template <int Bytes>
struct IntOfSize;
template <>
struct IntOfSize<4> {
  using type = int32_t;
};
template <>
struct IntOfSize<8> {
  using type = int64_t;
};

template <class T>
using Int = typename IntOfSize<sizeof(T)>::type;

// Vec<T>: a register of T. IntVec<T>: as many integers of the same width; also what a comparison of two Vec<T> gives.
template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(FASTSEG_VECTOR_BYTES)));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
using IntVec = typename VectorOf<Int<T>>::type;

template <class T>
constexpr int kLanes = FASTSEG_VECTOR_BYTES / sizeof(T);

template <class T>
constexpr T kLargestFinite = sizeof(T) == sizeof(float) ? static_cast<T>(__FLT_MAX__) : static_cast<T>(__DBL_MAX__);

template <class T>
FASTSEG_INLINE Vec<T> load(const T* source) {
  Vec<T> v;
  memcpy(&v, source, sizeof v);  // an unaligned vector load
  return v;
}

template <class T>
FASTSEG_INLINE void store(T* target, Vec<T> v) {
  memcpy(target, &v, sizeof v);
}

template <class T>
FASTSEG_INLINE Vec<T> broadcast(T value) {
  return value - Vec<T>{};
}

template <class T>
FASTSEG_INLINE bool any(IntVec<T> mask) {
  Int<T> found = 0;
  for (int lane = 0; lane < kLanes<T>; ++lane) found |= mask[lane];
  return found != 0;
}

template <class T>
FASTSEG_INLINE IntVec<T> bits_of(Vec<T> v) {
  IntVec<T> bits;
  memcpy(&bits, &v, sizeof v);
  return bits;
}

template <class T>
FASTSEG_INLINE Vec<T> from_bits(IntVec<T> bits) {
  Vec<T> v;
  memcpy(&v, &bits, sizeof v);
  return v;
}

// Four rows of four elements, turned into their four columns.
template <class T>
struct Quad {
  typedef T type __attribute__((vector_size(4 * sizeof(T))));
};

#if defined(__clang__)
#define FASTSEG_SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define FASTSEG_SHUFFLE(x, y, ...) __builtin_shuffle(x, y, decltype(x == y){__VA_ARGS__})
#endif

// Four elements of x (0 to 3) and y (4 to 7); of vectors of eight, the same in each half.
template <int A, int B, int C, int D, class V>
FASTSEG_INLINE V shuffle(V x, V y) {
  if constexpr (sizeof x / sizeof x[0] == 4) {
    return FASTSEG_SHUFFLE(x, y, A, B, C, D);
  } else {
    static_assert(sizeof x / sizeof x[0] == 8, "vectors of four or eight elements");
    constexpr int kA = A + A / 4 * 4, kB = B + B / 4 * 4, kC = C + C / 4 * 4, kD = D + D / 4 * 4;
    return FASTSEG_SHUFFLE(x, y, kA, kB, kC, kD, kA + 4, kB + 4, kC + 4, kD + 4);
  }
}

// The first four elements of x, and where there is room for eight those of y.
template <class V>
FASTSEG_INLINE V first_fours(V x, V y) {
  if constexpr (sizeof x / sizeof x[0] == 4)
    return x;
  else
    return FASTSEG_SHUFFLE(x, y, 0, 1, 2, 3, 8, 9, 10, 11);
}

// Rows and columns of 4 x 4 elements change places; in vectors of eight, those of each half.
template <class V>
FASTSEG_INLINE void transpose4(V (&row)[4]) {
  const V low01 = shuffle<0, 4, 1, 5>(row[0], row[1]), high01 = shuffle<2, 6, 3, 7>(row[0], row[1]);
  const V low23 = shuffle<0, 4, 1, 5>(row[2], row[3]), high23 = shuffle<2, 6, 3, 7>(row[2], row[3]);
  row[0] = shuffle<0, 1, 4, 5>(low01, low23);
  row[1] = shuffle<2, 3, 6, 7>(low01, low23);
  row[2] = shuffle<0, 1, 4, 5>(high01, high23);
  row[3] = shuffle<2, 3, 6, 7>(high01, high23);
}

}  // namespace
}  // namespace FASTSEG_ISA
}  // namespace fastseg

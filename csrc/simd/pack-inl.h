// Between a tensor's memory (any floating-point dtype, any strides) and the kernels' scratch (dense rows of float, or
// of double for float64 tensors). The kernels' loops know neither half types nor memory formats: these two functions
// do.
#pragma once

#include "core/tensor.h"
#include "simd/simd-inl.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

constexpr int64_t kPixelMultiple = 32;  // what scratch rows are filled up to: whole blocks of vectors, on every machine
// Scratch rows whose distance is a power of two would compete for the same cache sets.
constexpr int64_t kRowPadding = 64 / sizeof(float);

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class To, class From>
FASTSEG_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast changes no size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// Between float and the half types' bits, for one number (F = float, U = uint32_t) or a vector of them.
template <class F, class U>
FASTSEG_INLINE F widen_bfloat16(U half) {
  return bit_cast<F>(half << 16);
}
template <class F, class U>
FASTSEG_INLINE F widen_float16(U half) {
  const U magnitude = (half & 0x7fffu) << 13;
  const float rebias = bit_cast<float>(0x77800000u);  // 2^112: the difference of the two exponent biases
  const U finite = bit_cast<U>(bit_cast<F>(magnitude) * rebias);
  const U special = magnitude >= 0x0f800000u ? U{} + 0x7f800000u : U{};  // infinity and NaN keep a full exponent
  return bit_cast<F>(finite | special | (half & 0x8000u) << 16);
}

// Round to nearest, ties to even; NaN stays NaN.
template <class U, class F>
FASTSEG_INLINE U narrow_bfloat16(F value) {
  const U bits = bit_cast<U>(value);
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return value == value ? rounded : U{} + 0x7fc0u;
}
template <class U, class F>
FASTSEG_INLINE U narrow_float16(F value) {
  const U bits = bit_cast<U>(value), magnitude = bits & 0x7fffffffu;
  const U special = magnitude > 0x7f800000u ? U{} + 0x7e00u : U{} + 0x7c00u;
  // Below 2^-14 the result is subnormal: adding 0.5 moves its mantissa to the low bits, rounded by the addition.
  const U subnormal = bit_cast<U>(bit_cast<F>(magnitude) + 0.5f) - 0x3f000000u;
  const U normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const U finite = magnitude < 0x38800000u ? subnormal : normal;
  return (magnitude >= 0x47800000u ? special : finite) | ((bits >> 16) & 0x8000u);
}

FASTSEG_INLINE float widen(float value) {
  return value;
}
FASTSEG_INLINE double widen(double value) {
  return value;
}
FASTSEG_INLINE int32_t widen(uint8_t value) {
  return value;
}
FASTSEG_INLINE float widen(BFloat16 value) {
  return widen_bfloat16<float>(static_cast<uint32_t>(value.bits));
}
FASTSEG_INLINE float widen(Float16 value) {
  return widen_float16<float>(static_cast<uint32_t>(value.bits));
}

FASTSEG_INLINE void narrow(float value, float* target) {
  *target = value;
}
FASTSEG_INLINE void narrow(double value, double* target) {
  *target = value;
}
FASTSEG_INLINE void narrow(float value, BFloat16* target) {
  target->bits = static_cast<uint16_t>(narrow_bfloat16<uint32_t>(value));
}
FASTSEG_INLINE void narrow(float value, Float16* target) {
  target->bits = static_cast<uint16_t>(narrow_float16<uint32_t>(value));
}

// Window positions, which are computed in integers as wide as the values and kept as bytes.
FASTSEG_INLINE void narrow(int32_t value, uint8_t* target) {
  *target = static_cast<uint8_t>(value);
}
FASTSEG_INLINE void narrow(int64_t value, uint8_t* target) {
  *target = static_cast<uint8_t>(value);
}

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

// Four neighbours in memory, as a vector of T.
typedef uint32_t UInt4 __attribute__((vector_size(16)));
typedef uint16_t Half4 __attribute__((vector_size(8)));

template <class T, class S>
FASTSEG_INLINE typename Quad<T>::type load4(const S* source) {
  typename Quad<T>::type values;
  if constexpr (kSame<S, T>) {
    memcpy(&values, source, sizeof values);
  } else if constexpr (kSame<S, BFloat16> || kSame<S, Float16>) {
    Half4 half;
    memcpy(&half, source, sizeof half);
    const UInt4 bits = __builtin_convertvector(half, UInt4);
    if constexpr (kSame<S, BFloat16>)
      values = widen_bfloat16<Quad<float>::type>(bits);
    else
      values = widen_float16<Quad<float>::type>(bits);
  } else {
    for (int i = 0; i < 4; ++i) values[i] = widen(source[i]);
  }
  return values;
}

template <class T, class S>
FASTSEG_INLINE void store4(S* target, typename Quad<T>::type values) {
  if constexpr (kSame<S, T>) {
    memcpy(target, &values, sizeof values);
  } else if constexpr (kSame<S, BFloat16> || kSame<S, Float16>) {
    UInt4 bits;
    if constexpr (kSame<S, BFloat16>)
      bits = narrow_bfloat16<UInt4>(values);
    else
      bits = narrow_float16<UInt4>(values);
    const Half4 half = __builtin_convertvector(bits, Half4);
    memcpy(target, &half, sizeof half);
  } else {
    for (int i = 0; i < 4; ++i) narrow(values[i], &target[i]);
  }
}

// A block of 4 x 4, transposed: target[j * target_stride + i] = source[i * source_stride + j]. T does the arithmetic.
template <class T, class S, class Target>
FASTSEG_INLINE void transpose_block(const S* source, int64_t source_stride, Target* target, int64_t target_stride) {
  typename Quad<T>::type rows[4];
  for (int i = 0; i < 4; ++i) rows[i] = load4<T>(source + i * source_stride);
  if constexpr (kSame<T, int32_t> && kSame<Target, uint8_t>) {  // four bytes to a lane: a column without a shuffle
    static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the first byte is the lowest");
    const typename Quad<T>::type columns = rows[0] | (rows[1] << 8) | (rows[2] << 16) | (rows[3] << 24);
    for (int i = 0; i < 4; ++i) {
      const T column = columns[i];
      memcpy(target + i * target_stride, &column, sizeof column);
    }
    return;
  }
  transpose4(rows);
  for (int i = 0; i < 4; ++i) store4<T>(target + i * target_stride, rows[i]);
}

// target[row * target_stride + column] = source[row * row_stride + column * column_stride]
template <class S, class T>
void pack_from(const S* source, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride, T* target,
               int64_t target_stride) {
  if (column_stride == 1 && row_stride == columns && target_stride == columns) {  // dense: one long row
    columns *= rows;
    rows = 1;
  }
  if (column_stride == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      const S* from = source + r * row_stride;
      T* to = target + r * target_stride;
      for (int64_t c = 0; c < columns; ++c) to[c] = widen(from[c]);
    }
    return;
  }
  int64_t done = 0;  // columns that the blocks of 4 x 4 covered
  if (row_stride == 1 && rows >= 4) {
    for (; done + 4 <= columns; done += 4) {
      for (int64_t r = 0; r < rows; r += 4) {
        if (r + 4 > rows) r = rows - 4;  // the last block overlaps the one before
        transpose_block<T>(source + r + done * column_stride, column_stride, target + r * target_stride + done,
                           target_stride);
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = done; c < columns; ++c)
      target[r * target_stride + c] = widen(source[r * row_stride + c * column_stride]);
}

// target[row * row_stride + column * column_stride] = source[row * source_stride + column]
template <class T, class S>
void unpack_to(const T* source, int64_t source_stride, int64_t rows, int64_t columns, S* target, int64_t row_stride,
               int64_t column_stride) {
  if (column_stride == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      const T* from = source + r * source_stride;
      S* to = target + r * row_stride;
      for (int64_t c = 0; c < columns; ++c) narrow(from[c], &to[c]);
    }
    return;
  }
  int64_t done = 0;
  if (row_stride == 1 && rows >= 4) {
    for (; done + 4 <= columns; done += 4) {
      for (int64_t r = 0; r < rows; r += 4) {
        if (r + 4 > rows) r = rows - 4;
        transpose_block<T>(source + r * source_stride + done, source_stride, target + r + done * column_stride,
                           column_stride);
      }
    }
  }
  for (int64_t c = done; c < columns; ++c)
    for (int64_t r = 0; r < rows; ++r)
      narrow(source[r * source_stride + c], &target[r * row_stride + c * column_stride]);
}

// The dtype of a tensor that holds T itself.
template <class T>
constexpr DType kDType = sizeof(T) == sizeof(double) ? DType::kFloat64 : DType::kFloat32;

// The dtype's C++ type, chosen at run time. float64 tensors go with T = double, all others with T = float.
inline void pack(const void* source, DType dtype, int64_t rows, int64_t columns, int64_t row_stride,
                 int64_t column_stride, float* target, int64_t target_stride) {
  const auto from = [&](const auto* typed) {
    pack_from(typed, rows, columns, row_stride, column_stride, target, target_stride);
  };
  if (dtype == DType::kFloat32) from(static_cast<const float*>(source));
  if (dtype == DType::kBFloat16) from(static_cast<const BFloat16*>(source));
  if (dtype == DType::kFloat16) from(static_cast<const Float16*>(source));
}

inline void pack(const void* source, DType, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride,
                 double* target, int64_t target_stride) {
  pack_from(static_cast<const double*>(source), rows, columns, row_stride, column_stride, target, target_stride);
}

inline void unpack(const float* source, int64_t source_stride, int64_t rows, int64_t columns, void* target, DType dtype,
                   int64_t row_stride, int64_t column_stride) {
  const auto to = [&](auto* typed) {
    unpack_to(source, source_stride, rows, columns, typed, row_stride, column_stride);
  };
  if (dtype == DType::kFloat32) to(static_cast<float*>(target));
  if (dtype == DType::kBFloat16) to(static_cast<BFloat16*>(target));
  if (dtype == DType::kFloat16) to(static_cast<Float16*>(target));
}

inline void unpack(const double* source, int64_t source_stride, int64_t rows, int64_t columns, void* target, DType,
                   int64_t row_stride, int64_t column_stride) {
  unpack_to(source, source_stride, rows, columns, static_cast<double*>(target), row_stride, column_stride);
}

inline int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::kUInt8:
      return 1;
    case DType::kBFloat16:
    case DType::kFloat16:
    case DType::kInt16:
      return 2;
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kFloat64:
    case DType::kInt64:
      return 8;
  }
  return 0;
}

// The address of the element at `offset` (in elements).
inline const void* at(const Tensor& tensor, int64_t offset) {
  return static_cast<const char*>(tensor.data) + offset * element_size(tensor.dtype);
}
inline void* at_mutable(const Tensor& tensor, int64_t offset) {
  return static_cast<char*>(tensor.data) + offset * element_size(tensor.dtype);
}

}  // namespace
}  // namespace FASTSEG_ISA
}  // namespace fastseg

// Between a tensor's memory (any floating-point dtype, any strides) and the kernels' scratch (dense rows of float, or
// of double for float64 tensors). The kernels' loops know neither half types nor memory formats: these two functions
// do.
#pragma once

#include "simd.h"
#include "tensor.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

FASTSEG_INLINE uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

FASTSEG_INLINE float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
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
  return bits_float(static_cast<uint32_t>(value.bits) << 16);
}
FASTSEG_INLINE float widen(Float16 value) {
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fff) << 13;
  const float rebias = bits_float(0x77800000);  // 2^112: the difference of the two exponent biases
  const uint32_t finite = float_bits(bits_float(magnitude) * rebias);
  const uint32_t special = (magnitude >= 0x0f800000) ? 0x7f800000u : 0u;  // infinity and NaN keep a full exponent
  return bits_float(finite | special | (static_cast<uint32_t>(value.bits & 0x8000) << 16));
}

// Round to nearest, ties to even; NaN stays NaN.
FASTSEG_INLINE void narrow(float value, float* target) {
  *target = value;
}
FASTSEG_INLINE void narrow(double value, double* target) {
  *target = value;
}
FASTSEG_INLINE void narrow(float value, BFloat16* target) {
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  target->bits = static_cast<uint16_t>(value == value ? rounded : 0x7fc0u);
}
FASTSEG_INLINE void narrow(float value, Float16* target) {
  const uint32_t bits = float_bits(value), magnitude = bits & 0x7fffffff;
  const uint32_t special = magnitude > 0x7f800000 ? 0x7e00u : 0x7c00u;
  // Below 2^-14 the result is subnormal: adding 0.5 moves its mantissa to the low bits, rounded by the addition.
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000;
  const uint32_t normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t result = magnitude >= 0x47800000 ? special : magnitude < 0x38800000 ? subnormal : normal;
  target->bits = static_cast<uint16_t>(result | ((bits >> 16) & 0x8000));
}

// Window positions, which are computed in integers as wide as the values and kept as bytes.
FASTSEG_INLINE void narrow(int32_t value, uint8_t* target) {
  *target = static_cast<uint8_t>(value);
}
FASTSEG_INLINE void narrow(int64_t value, uint8_t* target) {
  *target = static_cast<uint8_t>(value);
}

// Blocks of 4 x 4, transposed: four numbers that are neighbours in memory become one column of four rows.
template <class S, class T>
FASTSEG_INLINE void pack_block(const S* source, int64_t column_stride, T* target, int64_t target_stride) {
  T block[4][4];
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) block[i][j] = widen(source[i * column_stride + j]);
  transpose4(&block[0][0], 4, target, target_stride);
}
template <class T>
FASTSEG_INLINE void pack_block(const T* source, int64_t column_stride, T* target, int64_t target_stride) {
  transpose4(source, column_stride, target, target_stride);
}

template <class T, class S>
FASTSEG_INLINE void unpack_block(const T* source, int64_t source_stride, S* target, int64_t column_stride) {
  T block[4][4];
  transpose4(source, source_stride, &block[0][0], 4);
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) narrow(block[i][j], &target[i * column_stride + j]);
}
template <class T>
FASTSEG_INLINE void unpack_block(const T* source, int64_t source_stride, T* target, int64_t column_stride) {
  transpose4(source, source_stride, target, column_stride);
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
        pack_block(source + r + done * column_stride, column_stride, target + r * target_stride + done, target_stride);
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
        unpack_block(source + r * source_stride + done, source_stride, target + r + done * column_stride,
                     column_stride);
      }
    }
  }
  for (int64_t c = done; c < columns; ++c)
    for (int64_t r = 0; r < rows; ++r)
      narrow(source[r * source_stride + c], &target[r * row_stride + c * column_stride]);
}

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

// A tensor as the kernels see it: pointer, element type, sizes and strides. Nothing here owns memory.
#pragma once

#include <stdint.h>

namespace fastseg {

// The order is the contract with fastseg/_native.py, which sends these numbers.
enum class DType : int { kFloat32, kFloat64, kBFloat16, kFloat16, kUInt8, kInt16, kInt32, kInt64 };

constexpr int kMaxDims = 8;

struct Tensor {
  void* data = nullptr;  // null: an optional tensor that was not given, or one without elements
  DType dtype = DType::kFloat32;
  int ndim = 0;
  int64_t size[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};  // in elements, as torch counts

  explicit operator bool() const { return data != nullptr; }
};

}  // namespace fastseg

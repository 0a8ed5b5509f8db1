// Transformed weights that stay from call to call: where they lie, and how a call sees whether they are still those of
// its weights. It reads the weights for that, which costs a fraction of the transform: nobody has to tell of a change,
// and none goes unseen, however it was made.
#pragma once

#include "core/integers.h"
#include "core/parallel.h"
#include "core/tensor.h"
#include "simd/pack-inl.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

// Ahead of the transformed weights.
struct alignas(64) KeptHeader {
  uint64_t fingerprint;
  int64_t elements;  // of what follows
  int64_t lanes;     // of the instruction set that wrote it
};

constexpr uint64_t kOddMultiplier = 0x9e3779b97f4a7c15;

inline uint64_t mix(uint64_t state, uint64_t value) {
  state = (state ^ value) * kOddMultiplier;
  return state ^ (state >> 29);
}

// A number that changes with every byte and its place. Each 32-bit lane sums its words times powers of an odd number:
// one changed word never leaves it as it was, and several do by a chance of 2^-32.
inline uint64_t fingerprint_of(const char* data, int64_t bytes) {
  typedef uint32_t Words __attribute__((vector_size(FASTSEG_VECTOR_BYTES)));
  constexpr int kStreams = 4;
  constexpr uint32_t kMultiplier = 0x01000193;
  constexpr int64_t kWidth = sizeof(Words);
  Words sums[kStreams] = {};
  int64_t at = 0;
  for (; at + kStreams * kWidth <= bytes; at += kStreams * kWidth)
#pragma GCC unroll 4
    for (int stream = 0; stream < kStreams; ++stream) {
      Words words;
      memcpy(&words, data + at + stream * kWidth, kWidth);
      sums[stream] = sums[stream] * kMultiplier + words;
    }
  uint64_t result = mix(0, static_cast<uint64_t>(bytes));
  for (; at < bytes; ++at) result = mix(result, static_cast<unsigned char>(data[at]));
  for (const Words& sum : sums)
    for (int lane = 0; lane < kLanes<float>; ++lane) result = mix(result, sum[lane]);
  return result;
}

// The same of many bytes, in pieces of one size whatever the number of threads.
inline uint64_t fingerprint_of(const void* data, int64_t bytes, int threads) {
  constexpr int64_t kPiece = 128 * 1024;
  uint64_t sum = 0;
  for_each_task(ceil_div(bytes, kPiece), threads, [&](int64_t piece) {
    const int64_t begin = piece * kPiece;
    const char* part = static_cast<const char*>(data) + begin;
    const uint64_t of_part = mix(static_cast<uint64_t>(piece), fingerprint_of(part, min_of(kPiece, bytes - begin)));
    __atomic_fetch_add(&sum, of_part, __ATOMIC_RELAXED);  // of integers: the same in any order
    return true;
  });
  return sum;
}

// Of what is made of a convolution's weights: they lie dense, [K, C, height, width] in either memory format, and so do
// the others, [K], which are optional. A stamp that isn't zero stands for the weights' values.
inline uint64_t fingerprint_of(const Tensor& weight, const Tensor& bias, const Tensor& scale, uint64_t stamp,
                               int threads) {
  const int64_t kernel = weight.size[1] * weight.size[2] * weight.size[3];
  uint64_t result = mix(static_cast<uint64_t>(weight.stride[1]), static_cast<uint64_t>(weight.stride[3]));
  const Tensor* tensors[] = {&weight, &bias, &scale};
  for (const Tensor* tensor : tensors) {
    const int64_t elements = weight.size[0] * (tensor == &weight ? kernel : 1);
    const bool stamped = tensor == &weight && stamp != 0;
    const auto read = [&] { return fingerprint_of(tensor->data, elements * element_size(weight.dtype), threads); };
    result = mix(result, stamped ? stamp : *tensor ? read() : 0);
  }
  return result;
}

}  // namespace
}  // namespace FASTSEG_ISA
}  // namespace fastseg

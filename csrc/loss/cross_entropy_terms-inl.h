// What cross_entropy's and upsample_cross_entropy's kernels share: labels, the classes' weights, and sums over pixels.
#pragma once

#include <math.h>

#include "loss/losses.h"
#include "simd/pack-inl.h"
#include "simd/simd-inl.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

// What a kernel is compiled for: the type that it computes in, and the kind of call.
template <class T_, auto kKind_>
struct Instance {
  using T = T_;
  static constexpr auto kKind = kKind_;
};

// Calls run with the Instance for a call of a kind.
template <auto kKind, class Call, class Run>
void with_type(const Call& call, const Run& run) {
  return call.input.dtype == DType::kFloat64 ? run(Instance<double, kKind>()) : run(Instance<float, kKind>());
}

// A label in a lane's integer; negative where the pixel is ignored.
constexpr int kIgnored = -1;  // all bits set

template <class Call, class Label, class I>
FASTSEG_INLINE bool read_labels_of(const Label* source, int64_t count, int64_t stride, const Call& call, I* labels) {
  // In masks and sign bits, which compilers make vectors of.
  const uint64_t last = static_cast<uint64_t>(call.input.size[1]) - 1;
  const int64_t ignore_index = call.ignore_index;
  uint64_t outside = 0;  // negative where a label that counts is, or where it is beyond the last
  for (int64_t p = 0; p < count; ++p) {
    const int64_t label = source[p * stride];
    const int64_t ignored = -static_cast<int64_t>(label == ignore_index);
    labels[p] = static_cast<I>(label | ignored);
    const uint64_t bits = static_cast<uint64_t>(label);
    outside |= (bits | (last - bits)) & ~static_cast<uint64_t>(ignored);
  }
  return static_cast<int64_t>(outside) >= 0;
}

template <class Call, class Label>
int64_t first_invalid(const Label* source, int64_t stride, const Call& call) {
  for (int64_t p = 0;; p += stride) {
    const int64_t label = source[p];
    if (label != call.ignore_index && (label < 0 || label >= call.input.size[1])) return label;
  }
}

// Reads the labels of `count` pixels that lie `stride` apart from `offset` on. False, and *invalid says which, where
// one is no class. Call: anything with input, target and ignore_index.
template <class Call, class I>
bool read_label_run(const Call& call, int64_t offset, int64_t count, int64_t stride, I* labels, InvalidLabel* invalid) {
  const auto read = [&](const auto* source) {
    if (invalid->found) return;
    // Neighbours are read by vectors.
    if (stride == 1 ? read_labels_of(source, count, 1, call, labels)
                    : read_labels_of(source, count, stride, call, labels))
      return;
    *invalid = {true, first_invalid(source, stride, call)};
  };
  const void* source = at(call.target, offset);
  if (call.target.dtype == DType::kUInt8) read(static_cast<const uint8_t*>(source));
  if (call.target.dtype == DType::kInt16) read(static_cast<const int16_t*>(source));
  if (call.target.dtype == DType::kInt32) read(static_cast<const int32_t*>(source));
  if (call.target.dtype == DType::kInt64) read(static_cast<const int64_t*>(source));
  return !invalid->found;
}

// Tells the caller of the first invalid label in the order of the tasks, whichever thread met one first. Task: what has
// an InvalidLabel invalid.
template <class Call, class Task>
void report_invalid(const Call& call, const Task* tasks, int64_t count) {
  *call.invalid = {};
  for (int64_t task = 0; task < count && !call.invalid->found; ++task) *call.invalid = tasks[task].invalid;
}

// How much a class counts: q = probability * scale[c] + shift[c], which holds the class's weight and the smoothing.
template <class T>
struct ClassTerms {
  T smoothing;   // zero where it is off
  bool uniform;  // whether every class weighs 1
  T *weight, *scale, *shift;
  T shift_sum;

  static int64_t elements(int64_t classes) { return 3 * classes; }

  ClassTerms(const CrossEntropy& call, T* memory) {
    const int64_t classes = call.input.size[1];
    smoothing = call.label_smoothing > 0 ? static_cast<T>(call.label_smoothing) : T(0);
    uniform = !call.weight;
    weight = memory;
    scale = memory + classes;
    shift = memory + 2 * classes;
    double sum = 0;
    for (int64_t c = 0; c < classes; ++c) {
      weight[c] = call.weight ? static_cast<const T*>(call.weight.data)[c] : T(1);
      scale[c] = (1 - smoothing) * weight[c];
      shift[c] = smoothing / static_cast<T>(classes) * weight[c];
      sum += static_cast<double>(shift[c]);
    }
    shift_sum = static_cast<T>(sum);
  }
};

// Sums over a task's pixels, in double whatever T: a mean over 10^8 pixels keeps its digits.
struct Partial {
  double loss, weight;
  InvalidLabel invalid;
};

template <class T>
double sum_of(const T* values, int64_t count) {
  constexpr int kSums = 8;  // independent, so that the compiler can vectorise
  double sums[kSums] = {};
  int64_t p = 0;
  for (; p + kSums <= count; p += kSums)
    for (int i = 0; i < kSums; ++i) sums[i] += static_cast<double>(values[p + i]);
  for (; p < count; ++p) sums[0] += static_cast<double>(values[p]);
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

// Adds up the tasks' sums, in their order, and stores the reduced loss and what "mean" divides by.
template <class T>
void store_totals(const CrossEntropyForward& call, const Partial* partials, int64_t tasks, bool smoothed_labels) {
  double loss = 0, weight = 0;
  report_invalid(call, partials, tasks);
  for (int64_t task = 0; task < tasks; ++task) {
    loss += partials[task].loss;
    weight += partials[task].weight;
  }
  *static_cast<T*>(call.total_weight.data) = static_cast<T>(weight);
  if (call.reduction == Reduction::kNone) return;
  if (call.reduction == Reduction::kMean) {
    // Where no label has weight, the labels' own share is 0 / 0, whatever the smoothing's is.
    loss = smoothed_labels && weight == 0 ? double{NAN} : loss / weight;
  }
  *static_cast<T*>(call.loss.data) = static_cast<T>(loss);
}

template <class T>
T scalar_of(const Tensor& tensor) {
  return *static_cast<const T*>(tensor.data);
}

// The gradient of every pixel's loss where they were reduced.
template <class T>
T grad_of_reduced(const CrossEntropyBackward& call) {
  const T grad = scalar_of<T>(call.grad_output);
  return call.reduction == Reduction::kMean ? grad / scalar_of<T>(call.total_weight) : grad;
}

}  // namespace
}  // namespace FASTSEG_ISA
}  // namespace fastseg

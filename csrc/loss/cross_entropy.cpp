// cross_entropy's CPU kernels. For a pixel with logits x, with m = max(x), s = log(sum(exp(x - m))) and the target
// distribution q (a weighted one-hot vector, smoothed or not, or weighted class probabilities):
//   loss = -sum(q * (x - m - s))      d loss / dx = exp(x - m - s) * sum(q) - q
// Forward reads the logits once and keeps m and s; backward reads the logits once and writes the gradient once.
#include "loss/cross_entropy.h"

#include "loss/cross_entropy_loops-inl.h"
#include "loss/cross_entropy_tiles-inl.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

Kind kind_of(const CrossEntropy& call) {
  if (call.target.ndim == call.input.ndim) return Kind::kProbabilities;
  return call.label_smoothing > 0 ? Kind::kSmoothedLabels : Kind::kLabels;
}

// Whether a pixel's classes are neighbours in memory, at least a vector of them, of type T: channels_last, or [N, C].
template <class T>
bool classes_are_dense(const Tensor& tensor) {
  return tensor.dtype == kDType<T> && tensor.stride[1] == 1 && tensor.size[1] >= kLanes<T>;
}

// ---- forward ----

// Vectors of classes from which the forward's loops along dense classes pay for adding up a vector's lanes for each
// pixel (AVX2, AMD Zen 3, 2026-11-22).
constexpr int64_t kLeastClassVectors = 8;

template <class T, Kind kKind>
bool forward_task(const CrossEntropyForward& call, const Pixels& pixels, const Plan& plan, int64_t task,
                  Partial* partial) {
  constexpr bool kProbabilities = kKind == Kind::kProbabilities;
  T* const memory = tile_memory<T>(plan, kProbabilities);
  if (memory == nullptr) return false;
  const Tile<T> tile(plan.classes, plan.tile_stride, kProbabilities, memory);
  const ClassTerms<T> terms(call, memory + Tile<T>::elements(plan.classes, plan.tile_stride, kProbabilities));
  const bool dense_classes =
      !kProbabilities && classes_are_dense<T>(call.input) && plan.classes >= kLeastClassVectors * kLanes<T>;
  T* const statistics = static_cast<T*>(call.statistics.data);
  for_each_tile(plan, pixels, task, [&](int64_t begin, int64_t count) {
    if (!kProbabilities && !read_labels(call, pixels, begin, count, tile.labels, &partial->invalid)) return false;
    if (dense_classes) {
      for_each_run(pixels, begin, count, [&](const Run& run) {
        reduce_pixels<T, kKind>(tile, terms, run.first, run.length,
                                static_cast<const T*>(call.input.data) + run.offset[kInput],
                                pixels.inner_stride(kInput));
      });
      finish_reduced_pixels<T, kKind>(tile, terms, count);
    } else {
      pack_tile(call.input, kInput, pixels, begin, count, tile.logits, tile.stride);
      if (kProbabilities) pack_tile(call.target, kTarget, pixels, begin, count, tile.probabilities, tile.stride);
      reduce_classes<T, kKind>(tile, terms, count, LogitsInPlace<T>{tile}, KeepNothing<T>{});
    }
    finish_pixels<T, kKind>(tile, terms, count);
    if (call.statistics) {
      memcpy(statistics + begin, tile.largest, count * sizeof(T));
      memcpy(statistics + pixels.count + begin, tile.log_sum, count * sizeof(T));
    }
    if (call.reduction == Reduction::kNone)
      memcpy(static_cast<T*>(call.loss.data) + begin, tile.loss, count * sizeof(T));
    partial->loss += sum_of(tile.loss, count);
    partial->weight += sum_of(tile.weight, count);
    return true;
  });
  return true;
}

template <class T, Kind kKind>
void forward(const CrossEntropyForward& call) {
  const Tensor* const tensors[kRoles] = {&call.input, &call.target, nullptr, nullptr};
  const Pixels pixels(tensors);
  const Plan plan = Plan::of<T>(call, pixels, kKind == Kind::kProbabilities);
  Partial partials[kMaxTasks];
  memset(partials, 0, plan.tasks * sizeof(Partial));
  for_each_task(plan.tasks, call.threads,
                [&](int64_t task) { return forward_task<T, kKind>(call, pixels, plan, task, &partials[task]); });
  store_totals<T>(call, partials, plan.tasks, kKind == Kind::kSmoothedLabels);
}

// ---- backward ----

// The tile's rows where they lie in the tensor's memory.
template <class T>
Rows<T> rows_in_place(const Tensor& tensor, Role role, const Pixels& pixels, int64_t begin, int64_t count) {
  Rows<T> rows = {nullptr, tensor.stride[1]};
  for_each_run(pixels, begin, count,
               [&](const Run& run) { rows.data = static_cast<T*>(tensor.data) + run.offset[role]; });
  return rows;
}

// The tile's rows, in place or else packed into the buffer.
template <class T>
Rows<const T> rows_of(const Tensor& tensor, Role role, const Pixels& pixels, int64_t begin, int64_t count, T* buffer,
                      int64_t stride) {
  if (is_row_major<T>(tensor, role, pixels, begin, count))
    return rows_in_place<const T>(tensor, role, pixels, begin, count);
  pack_tile(tensor, role, pixels, begin, count, buffer, stride);
  return {buffer, stride};
}

// The incoming gradient of each pixel's loss, before its weight.
template <class T>
void read_grad(const CrossEntropyBackward& call, const Pixels& pixels, int64_t begin, int64_t count, T* grad) {
  if (call.reduction == Reduction::kNone) {
    for_each_run(pixels, begin, count, [&](const Run& run) {
      pack(at(call.grad_output, run.offset[kGradOutput]), call.grad_output.dtype, 1, run.length, 0,
           pixels.inner_stride(kGradOutput), grad + run.first, 0);
    });
    return;
  }
  const T reduced = grad_of_reduced<T>(call);
  for (int64_t p = 0; p < count; ++p) grad[p] = reduced;
}

template <class T, Kind kKind>
bool backward_task(const CrossEntropyBackward& call, const Pixels& pixels, const Plan& plan, int64_t task,
                   InvalidLabel* invalid) {
  constexpr bool kProbabilities = kKind == Kind::kProbabilities;
  T* const memory = tile_memory<T>(plan, kProbabilities);
  if (memory == nullptr) return false;
  const Tile<T> tile(plan.classes, plan.tile_stride, kProbabilities, memory);
  const ClassTerms<T> terms(call, memory + Tile<T>::elements(plan.classes, plan.tile_stride, kProbabilities));

  const bool dense_classes =
      !kProbabilities && classes_are_dense<T>(call.input) && classes_are_dense<T>(call.grad_input);

  const T* const statistics = static_cast<const T*>(call.statistics.data);
  for_each_tile(plan, pixels, task, [&](int64_t begin, int64_t count) {
    if (!kProbabilities && !read_labels(call, pixels, begin, count, tile.labels, invalid)) return false;
    memcpy(tile.largest, statistics + begin, count * sizeof(T));
    memcpy(tile.log_sum, statistics + pixels.count + begin, count * sizeof(T));
    read_grad(call, pixels, begin, count, tile.grad);
    if (dense_classes) {
      weigh_pixels<T, kKind>(tile, terms, {}, count);
      for_each_run(pixels, begin, count, [&](const Run& run) {
        differentiate_pixels<T, kKind>(
            tile, terms, run.first, run.length, static_cast<const T*>(call.input.data) + run.offset[kInput],
            pixels.inner_stride(kInput), static_cast<T*>(call.grad_input.data) + run.offset[kGradInput],
            pixels.inner_stride(kGradInput));
      });
      return true;
    }
    const Rows<const T> logits = rows_of(call.input, kInput, pixels, begin, count, tile.logits, tile.stride);
    Rows<const T> target = {nullptr, 0};
    if (kProbabilities) target = rows_of(call.target, kTarget, pixels, begin, count, tile.probabilities, tile.stride);
    weigh_pixels<T, kKind>(tile, terms, target, count);
    const bool in_place = is_row_major<T>(call.grad_input, kGradInput, pixels, begin, count);
    const Rows<T> grad_logits = in_place ? rows_in_place<T>(call.grad_input, kGradInput, pixels, begin, count)
                                         : Rows<T>{tile.logits, tile.stride};
    const auto logits_at = [=](int64_t c, int64_t p) { return load(logits.data + c * logits.stride + p); };
    differentiate<T, kKind>(tile, terms, probabilities_of(tile, logits_at), target, count, KeepInRows<T>{grad_logits});
    if (!in_place) unpack_tile(tile.logits, tile.stride, call.grad_input, kGradInput, pixels, begin, count);
    return true;
  });
  return true;
}

template <class T, Kind kKind>
void backward(const CrossEntropyBackward& call) {
  const Tensor* const tensors[kRoles] = {&call.input, &call.target, &call.grad_output, &call.grad_input};
  const Pixels pixels(tensors);
  const Plan plan = Plan::of<T>(call, pixels, kKind == Kind::kProbabilities);
  InvalidLabel invalid[kMaxTasks];
  memset(invalid, 0, plan.tasks * sizeof(InvalidLabel));
  for_each_task(plan.tasks, call.threads,
                [&](int64_t task) { return backward_task<T, kKind>(call, pixels, plan, task, &invalid[task]); });
  *call.invalid = {};
  for (int64_t task = 0; task < plan.tasks; ++task) keep_first(invalid[task], call.invalid);
}

}  // namespace

void cross_entropy_forward(const CrossEntropyForward& call) {
  const bool wide = call.input.dtype == DType::kFloat64;
  switch (kind_of(call)) {
    case Kind::kLabels:
      return wide ? forward<double, Kind::kLabels>(call) : forward<float, Kind::kLabels>(call);
    case Kind::kSmoothedLabels:
      return wide ? forward<double, Kind::kSmoothedLabels>(call) : forward<float, Kind::kSmoothedLabels>(call);
    case Kind::kProbabilities:
      return wide ? forward<double, Kind::kProbabilities>(call) : forward<float, Kind::kProbabilities>(call);
  }
}

void cross_entropy_backward(const CrossEntropyBackward& call) {
  const bool wide = call.input.dtype == DType::kFloat64;
  switch (kind_of(call)) {
    case Kind::kLabels:
      return wide ? backward<double, Kind::kLabels>(call) : backward<float, Kind::kLabels>(call);
    case Kind::kSmoothedLabels:
      return wide ? backward<double, Kind::kSmoothedLabels>(call) : backward<float, Kind::kSmoothedLabels>(call);
    case Kind::kProbabilities:
      return wide ? backward<double, Kind::kProbabilities>(call) : backward<float, Kind::kProbabilities>(call);
  }
}

}  // namespace FASTSEG_ISA
}  // namespace fastseg

// cross_entropy's CPU kernels. For a pixel with logits x, with m = max(x), s = log(sum(exp(x - m))) and the target
// distribution q (a weighted one-hot vector, smoothed or not, or weighted class probabilities):
//   loss = -sum(q * (x - m - s))      d loss / dx = exp(x - m - s) * sum(q) - q
// Forward reads the logits once and keeps m and s; backward reads the logits once and writes the gradient once.
#include "cross_entropy.h"

#include "cross_entropy_tiles.h"
#include "vector_math.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

// What the target is, which decides the loops' arithmetic.
enum class Kind { kLabels, kSmoothedLabels, kProbabilities };

Kind kind_of(const CrossEntropy& call) {
  if (call.target.ndim == call.input.ndim) return Kind::kProbabilities;
  return call.label_smoothing > 0 ? Kind::kSmoothedLabels : Kind::kLabels;
}

// ---- forward ----

// largest, log_sum, and in spread what the target's dense part contributes: sum(shift * (x - m - s)) for smoothed
// labels, sum(q * (x - m - s)) for probabilities.
template <class T, Kind kKind>
void reduce_classes(const Tile<T>& tile, const ClassTerms<T>& terms, int64_t count) {
  constexpr int kVectors = 2;  // as many as leave exp's constants in registers
  for (int64_t p = 0; p < count; p += kVectors * kLanes<T>) {
    const T* column = tile.logits + p;
    Vec<T> largest[kVectors], sum[kVectors] = {}, spread[kVectors] = {};
    for (int i = 0; i < kVectors; ++i) largest[i] = load(column + i * kLanes<T>);
    for (int64_t c = 1; c < tile.classes; ++c)
      for (int i = 0; i < kVectors; ++i)
        largest[i] = maximum<T>(largest[i], load(column + c * tile.stride + i * kLanes<T>));
    for (int64_t c = 0; c < tile.classes; ++c)
      for (int i = 0; i < kVectors; ++i)
        sum[i] += exp_of_nonpositive<T>(load(column + c * tile.stride + i * kLanes<T>) - largest[i]);
    for (int i = 0; i < kVectors; ++i) {
      sum[i] = log_of_positive<T>(sum[i]);
      store(tile.largest + p + i * kLanes<T>, largest[i]);
      store(tile.log_sum + p + i * kLanes<T>, sum[i]);
    }
    if (kKind == Kind::kLabels) continue;
    const T* probabilities = tile.probabilities + p;
    for (int64_t c = 0; c < tile.classes; ++c)
      for (int i = 0; i < kVectors; ++i) {
        const int64_t at = c * tile.stride + i * kLanes<T>;
        const Vec<T> log_probability = (load(column + at) - largest[i]) - sum[i];
        if (kKind == Kind::kSmoothedLabels)
          spread[i] += log_probability * terms.shift[c];
        else
          spread[i] += log_probability * (load(probabilities + at) * terms.scale[c] + terms.shift[c]);
      }
    for (int i = 0; i < kVectors; ++i) store(tile.spread + p + i * kLanes<T>, spread[i]);
  }
}

// loss and weight of each pixel, from reduce_classes' results and the labels.
template <class T, Kind kKind>
void finish_pixels(const Tile<T>& tile, const ClassTerms<T>& terms, int64_t count) {
  if (kKind == Kind::kProbabilities) {
    for (int64_t p = 0; p < count; ++p) {
      tile.loss[p] = -tile.spread[p];
      tile.weight[p] = 1;
    }
    return;
  }
  for (int64_t p = 0; p < count; ++p) {
    const Int<T> label = tile.labels[p] == kIgnored ? 0 : tile.labels[p];
    tile.loss[p] = tile.logits[label * tile.stride + p];
    tile.weight[p] = terms.weight[label];
  }
  for (int64_t p = 0; p < count; ++p) {
    const bool ignored = tile.labels[p] == kIgnored;
    T loss = ((tile.largest[p] - tile.loss[p]) + tile.log_sum[p]) * tile.weight[p];
    if (kKind == Kind::kSmoothedLabels) loss = loss * (1 - terms.smoothing) - tile.spread[p];
    tile.loss[p] = ignored ? 0 : loss;
    tile.weight[p] = ignored ? 0 : tile.weight[p];
  }
}

template <class T, Kind kKind>
bool forward_task(const CrossEntropyForward& call, const Pixels& pixels, const Plan& plan, int64_t task,
                  Partial* partial) {
  constexpr bool kProbabilities = kKind == Kind::kProbabilities;
  T* const memory = tile_memory<T>(plan, kProbabilities);
  if (memory == nullptr) return false;
  const Tile<T> tile(plan, kProbabilities, memory);
  const ClassTerms<T> terms(call, memory + Tile<T>::elements(plan, kProbabilities));
  T* const statistics = static_cast<T*>(call.statistics.data);
  for_each_tile(plan, pixels, task, [&](int64_t begin, int64_t count) {
    if (!kProbabilities && !read_labels(call, pixels, begin, count, tile.labels, &partial->invalid)) return false;
    pack_tile(call.input, kInput, pixels, begin, count, tile.logits, tile.stride);
    if (kProbabilities) pack_tile(call.target, kTarget, pixels, begin, count, tile.probabilities, tile.stride);
    reduce_classes<T, kKind>(tile, terms, count);
    finish_pixels<T, kKind>(tile, terms, count);
    memcpy(statistics + begin, tile.largest, count * sizeof(T));
    memcpy(statistics + pixels.count + begin, tile.log_sum, count * sizeof(T));
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

template <class T>
struct Rows {
  T* data;
  int64_t stride;
};

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

// grad, zero where the pixel is ignored, and what of it goes to the label itself; for probabilities sum(q).
template <class T, Kind kKind>
void weigh_pixels(const Tile<T>& tile, const ClassTerms<T>& terms, Rows<const T> target, int64_t count) {
  if (kKind == Kind::kProbabilities) {
    for (int64_t p = 0; p < count; ++p) tile.target_sum[p] = 0;
    for (int64_t c = 0; c < tile.classes; ++c)
      for (int64_t p = 0; p < count; ++p)
        tile.target_sum[p] += target.data[c * target.stride + p] * terms.scale[c] + terms.shift[c];
    return;
  }
  for (int64_t p = 0; p < count; ++p) {
    const bool ignored = tile.labels[p] == kIgnored;
    tile.grad[p] = ignored ? 0 : tile.grad[p];
    tile.grad_of_label[p] = ignored ? 0 : terms.scale[tile.labels[p]] * tile.grad[p];
  }
}

// grad_logits = (exp(x - m - s) * sum(q) - q) * grad. May overwrite the logits. The label's share and the smoothing's
// are differences of their own, which vanish exactly where the probability is 1.
template <class T, Kind kKind>
void differentiate(const Tile<T>& tile, const ClassTerms<T>& terms, Rows<const T> logits, Rows<const T> target,
                   Rows<T> grad_logits, int64_t count) {
  for (int64_t c = 0; c < tile.classes; ++c) {
    const T* x = logits.data + c * logits.stride;
    const T* q = target.data + c * target.stride;
    T* grad_x = grad_logits.data + c * grad_logits.stride;
    const Int<T> label = static_cast<Int<T>>(c);
    for (int64_t p = 0; p < count; p += kLanes<T>) {
      const Vec<T> probability = exp_of_nonpositive<T>((load(x + p) - load(tile.largest + p)) - load(tile.log_sum + p));
      if (kKind == Kind::kProbabilities) {
        const Vec<T> share = load(q + p) * terms.scale[c] + terms.shift[c];
        store(grad_x + p, (probability * load(tile.target_sum + p) - share) * load(tile.grad + p));
        continue;
      }
      IntVec<T> labels;
      memcpy(&labels, tile.labels + p, sizeof labels);
      const Vec<T> one_hot = select_or_zero<T>(labels == label, broadcast<T>(1));
      Vec<T> grad = (probability - one_hot) * load(tile.grad_of_label + p);
      if (kKind == Kind::kSmoothedLabels)
        grad += (probability * terms.shift_sum - terms.shift[c]) * load(tile.grad + p);
      store(grad_x + p, grad);
    }
  }
}

template <class T, Kind kKind>
bool backward_task(const CrossEntropyBackward& call, const Pixels& pixels, const Plan& plan, int64_t task,
                   InvalidLabel* invalid) {
  constexpr bool kProbabilities = kKind == Kind::kProbabilities;
  T* const memory = tile_memory<T>(plan, kProbabilities);
  if (memory == nullptr) return false;
  const Tile<T> tile(plan, kProbabilities, memory);
  const ClassTerms<T> terms(call, memory + Tile<T>::elements(plan, kProbabilities));

  const T* const statistics = static_cast<const T*>(call.statistics.data);
  for_each_tile(plan, pixels, task, [&](int64_t begin, int64_t count) {
    if (!kProbabilities && !read_labels(call, pixels, begin, count, tile.labels, invalid)) return false;
    const Rows<const T> logits = rows_of(call.input, kInput, pixels, begin, count, tile.logits, tile.stride);
    Rows<const T> target = {nullptr, 0};
    if (kProbabilities) target = rows_of(call.target, kTarget, pixels, begin, count, tile.probabilities, tile.stride);
    memcpy(tile.largest, statistics + begin, count * sizeof(T));
    memcpy(tile.log_sum, statistics + pixels.count + begin, count * sizeof(T));
    read_grad(call, pixels, begin, count, tile.grad);
    weigh_pixels<T, kKind>(tile, terms, target, count);
    const bool in_place = is_row_major<T>(call.grad_input, kGradInput, pixels, begin, count);
    const Rows<T> grad_logits = in_place ? rows_in_place<T>(call.grad_input, kGradInput, pixels, begin, count)
                                         : Rows<T>{tile.logits, tile.stride};
    differentiate<T, kKind>(tile, terms, logits, target, grad_logits, count);
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

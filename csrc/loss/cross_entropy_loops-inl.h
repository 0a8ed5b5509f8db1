// The arithmetic of cross_entropy and upsample_cross_entropy, on a tile of pixels that lies in cache as dense rows
// along the pixels, one row a class.
#pragma once

#include "loss/cross_entropy_terms-inl.h"
#include "simd/vector_math-inl.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

// What the target is, which decides the loops' arithmetic.
enum class Kind { kLabels, kSmoothedLabels, kProbabilities };

// Calls run with the Instance for a call whose target is labels.
template <class Run>
void with_labels(const CrossEntropy& call, const Run& run) {
  return call.label_smoothing > 0 ? with_type<Kind::kSmoothedLabels>(call, run) : with_type<Kind::kLabels>(call, run);
}

// A tile's scratch memory. All pieces start on cache lines.
template <class T>
struct Tile {
  int64_t classes, stride;
  T *logits, *probabilities;             // [classes, stride]; probabilities only where the target is such
  T *largest, *log_sum;                  // [stride], as all that follow: the statistics
  T *spread, *loss, *weight;             // forward
  T *grad, *target_sum, *grad_of_label;  // backward
  Int<T>* labels;

  static int64_t elements(int64_t classes, int64_t stride, bool probabilities) {
    return (classes * (probabilities ? 2 : 1) + 9) * stride;
  }

  Tile(int64_t class_count, int64_t row_stride, bool has_probabilities, T* memory)
      : classes(class_count), stride(row_stride) {
    const auto take = [&](int64_t rows) {
      T* piece = memory;
      memory += rows * stride;
      return piece;
    };
    logits = take(classes);
    probabilities = has_probabilities ? take(classes) : nullptr;
    T** const arrays[] = {&largest, &log_sum, &spread, &loss, &weight, &grad, &target_sum, &grad_of_label};
    for (T** array : arrays) *array = take(1);
    labels = reinterpret_cast<Int<T>*>(take(1));
  }
};

template <class T>
FASTSEG_INLINE IntVec<T> load_labels(const Int<T>* source) {
  IntVec<T> labels;
  memcpy(&labels, source, sizeof labels);
  return labels;
}

template <class T>
struct Rows {
  T* data;
  int64_t stride;
};

// ---- forward ----

// exp(x - m - s) of the tile's pixels, from their logits and statistics.
template <class T, class Logits>
FASTSEG_INLINE auto probabilities_of(const Tile<T>& tile, const Logits logits) {
  const T *const largest = tile.largest, *const log_sum = tile.log_sum;
  return [=](int64_t c, int64_t p) {
    return exp_of_nonpositive<T>((logits(c, p) - load(largest + p)) - load(log_sum + p));
  };
}

// Where exponentials and gradients go to that stay as they are.
template <class T>
struct KeepInRows {
  Rows<T> rows;
  FASTSEG_INLINE void operator()(int64_t c, int64_t p, Vec<T> value) const {
    store(rows.data + c * rows.stride + p, value);
  }
};

// largest, log_sum, in loss the label's logit, and in spread what the target's dense part contributes: for labels
// sum(shift * (x - m - s)), for probabilities sum(q * (x - m - s)).
template <class T, Kind kKind>
FASTSEG_NOINLINE void reduce_classes(const Tile<T>& tile, const ClassTerms<T>& terms, int64_t count) {
  constexpr int kVectors = 2;  // as many as leave exp's constants in registers
  constexpr bool kProbabilities = kKind == Kind::kProbabilities;
  for (int64_t p = 0; p < count; p += kVectors * kLanes<T>) {
    const T* column = tile.logits + p;
    Vec<T> largest[kVectors], sum[kVectors] = {}, spread[kVectors] = {}, share[kVectors] = {};
    for (int i = 0; i < kVectors; ++i) largest[i] = load(column + i * kLanes<T>);
    for (int64_t c = 1; c < tile.classes; ++c)
      for (int i = 0; i < kVectors; ++i)
        largest[i] = maximum<T>(largest[i], load(column + c * tile.stride + i * kLanes<T>));
    if (!kProbabilities)
      for (int64_t lane = p; lane < p + kVectors * kLanes<T>; ++lane) {
        const Int<T> label = tile.labels[lane];
        tile.loss[lane] = tile.logits[(label == kIgnored ? 0 : label) * tile.stride + lane];
      }
    for (int64_t c = 0; c < tile.classes; ++c)
      for (int i = 0; i < kVectors; ++i) {
        const int64_t at = c * tile.stride + i * kLanes<T>;
        const Vec<T> difference = load(column + at) - largest[i];
        sum[i] += exp_of_nonpositive<T>(difference);
        if (kKind == Kind::kSmoothedLabels) spread[i] += difference * terms.shift[c];
        if (kProbabilities) {
          const Vec<T> q = load(tile.probabilities + p + at) * terms.scale[c] + terms.shift[c];
          spread[i] += difference * q;
          share[i] += q;
        }
      }
    for (int i = 0; i < kVectors; ++i) {
      sum[i] = log_of_positive<T>(sum[i]);
      store(tile.largest + p + i * kLanes<T>, largest[i]);
      store(tile.log_sum + p + i * kLanes<T>, sum[i]);
      if (kKind == Kind::kSmoothedLabels) spread[i] -= sum[i] * terms.shift_sum;
      if (kProbabilities) spread[i] -= sum[i] * share[i];
      if (kKind != Kind::kLabels) store(tile.spread + p + i * kLanes<T>, spread[i]);
    }
  }
}

// The result of `add`ing a vector's lanes to each other, half to half.
template <class T, class Add>
FASTSEG_INLINE T fold_lanes(Vec<T> v, Add add) {
  T lanes[kLanes<T>];
  memcpy(lanes, &v, sizeof v);
#pragma GCC unroll 8
  for (int half = kLanes<T> / 2; half > 0; half /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < half; ++i) lanes[i] = add(lanes[i], lanes[i + half]);
  return lanes[0];
}

// reduce_classes where a pixel's classes are neighbours in memory and the target is a label, for `count` pixels of the
// tile from `first` on: vectors run along the classes, of which there is at least one vector, and nothing is
// transposed. In log_sum it leaves the sum, in spread sum(shift * (x - m)): finish_reduced_pixels does the rest.
template <class T, Kind kKind>
FASTSEG_NOINLINE void reduce_pixels(const Tile<T>& tile, const ClassTerms<T>& terms, int64_t first, int64_t count,
                                    const T* logits, int64_t step) {
  const int64_t last = tile.classes - kLanes<T>, whole = tile.classes / kLanes<T> * kLanes<T>;
  IntVec<T> rest;  // of the last vector, the lanes that no vector before has
  for (int lane = 0; lane < kLanes<T>; ++lane) rest[lane] = last + lane < whole ? 0 : -1;
  for (int64_t p = first; p < first + count; ++p, logits += step) {
    Vec<T> largest = load(logits + last), sum = {}, spread = {};
    for (int64_t c = 0; c < whole; c += kLanes<T>) largest = maximum<T>(largest, load(logits + c));
    const T most = fold_lanes<T>(largest, [](T a, T b) { return a > b ? a : b; });
    const auto add = [&](int64_t c, IntVec<T> counted) {
      const Vec<T> difference = load(logits + c) - most;
      sum += select_or_zero<T>(counted, exp_of_nonpositive<T>(difference));
      if (kKind == Kind::kSmoothedLabels) spread += select_or_zero<T>(counted, difference * load(terms.shift + c));
    };
    for (int64_t c = 0; c < whole; c += kLanes<T>) add(c, ~IntVec<T>{});
    if (whole < tile.classes) add(last, rest);
    const Int<T> label = tile.labels[p];
    tile.loss[p] = logits[label == kIgnored ? 0 : label];
    tile.largest[p] = most;
    const auto plus = [](T a, T b) { return a + b; };
    tile.log_sum[p] = fold_lanes<T>(sum, plus);
    if (kKind == Kind::kSmoothedLabels) tile.spread[p] = fold_lanes<T>(spread, plus);
  }
}

template <class T, Kind kKind>
void finish_reduced_pixels(const Tile<T>& tile, const ClassTerms<T>& terms, int64_t count) {
  for (int64_t p = 0; p < count; p += kLanes<T>) {
    const Vec<T> log_sum = log_of_positive<T>(load(tile.log_sum + p));
    store(tile.log_sum + p, log_sum);
    if (kKind == Kind::kSmoothedLabels) store(tile.spread + p, load(tile.spread + p) - log_sum * terms.shift_sum);
  }
}

// loss and weight of each pixel, from reduce_classes' results and the labels.
template <class T, Kind kKind>
void weigh_losses(const Tile<T>& tile, const ClassTerms<T>& terms, int64_t count) {
  if (kKind == Kind::kProbabilities) {
    for (int64_t p = 0; p < count; ++p) {
      tile.loss[p] = -tile.spread[p];
      tile.weight[p] = 1;
    }
    return;
  }
  if (terms.uniform)
    for (int64_t p = 0; p < count; ++p) tile.weight[p] = tile.labels[p] == kIgnored ? 0 : 1;
  else
    for (int64_t p = 0; p < count; ++p) tile.weight[p] = tile.labels[p] == kIgnored ? 0 : terms.weight[tile.labels[p]];
  for (int64_t p = 0; p < count; ++p) {
    T loss = ((tile.largest[p] - tile.loss[p]) + tile.log_sum[p]) * tile.weight[p];
    if (kKind == Kind::kSmoothedLabels) loss = loss * (1 - terms.smoothing) - tile.spread[p];
    tile.loss[p] = tile.labels[p] == kIgnored ? 0 : loss;
  }
}

// The same; adds them to the task's sums, and stores what is kept of `count` of a call's `pixels`, from `first` on.
template <class T, Kind kKind>
FASTSEG_NOINLINE void finish_pixels(const CrossEntropyForward& call, const Tile<T>& tile, const ClassTerms<T>& terms,
                                    int64_t first, int64_t count, int64_t pixels, Partial* partial) {
  weigh_losses<T, kKind>(tile, terms, count);
  if (call.statistics) {
    T* const statistics = static_cast<T*>(call.statistics.data) + first;
    memcpy(statistics, tile.largest, count * sizeof(T));
    memcpy(statistics + pixels, tile.log_sum, count * sizeof(T));
  }
  if (call.reduction == Reduction::kNone) memcpy(static_cast<T*>(call.loss.data) + first, tile.loss, count * sizeof(T));
  partial->loss += sum_of(tile.loss, count);
  partial->weight += sum_of(tile.weight, count);
}

// ---- backward ----

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
  for (int64_t p = 0; p < count; ++p) tile.grad[p] = tile.labels[p] == kIgnored ? 0 : tile.grad[p];
  if (terms.uniform) {
    for (int64_t p = 0; p < count; ++p) tile.grad_of_label[p] = terms.scale[0] * tile.grad[p];
    return;
  }
  for (int64_t p = 0; p < count; ++p)
    tile.grad_of_label[p] = tile.labels[p] == kIgnored ? 0 : terms.scale[tile.labels[p]] * tile.grad[p];
}

// The gradient (P * sum(q) - q) * grad of a vector of logits where the target is a label. The label's share and the
// smoothing's are differences of their own, which vanish exactly where P is 1.
template <class T, Kind kKind>
FASTSEG_INLINE Vec<T> gradient_of_labels(Vec<T> probability, IntVec<T> is_label, Vec<T> grad_of_label, Vec<T> grad,
                                         Vec<T> shift_sum, Vec<T> shift) {
  const Vec<T> one_hot = select_or_zero<T>(is_label, broadcast<T>(1));
  const Vec<T> gradient = (probability - one_hot) * grad_of_label;
  return kKind == Kind::kSmoothedLabels ? gradient + (probability * shift_sum - shift) * grad : gradient;
}

// The gradient of the logits, with P = probabilities(c, p), given to keep(c, p, gradient), vector by vector.
template <class T, Kind kKind, class Probabilities, class Keep>
FASTSEG_NOINLINE void differentiate(const Tile<T>& tile, const ClassTerms<T>& terms, const Probabilities probabilities,
                                    Rows<const T> target, int64_t count, const Keep keep) {
  // Copies: what keep stores might be the tile's pointers, for all that a compiler knows.
  const T *const grad = tile.grad, *const grad_of_label = tile.grad_of_label, *const target_sum = tile.target_sum;
  const Int<T>* const labels = tile.labels;
  const Vec<T> shift_sum = broadcast<T>(terms.shift_sum);
  for (int64_t c = 0; c < tile.classes; ++c) {
    const Vec<T> scale = broadcast<T>(terms.scale[c]), shift = broadcast<T>(terms.shift[c]);
    const IntVec<T> label = static_cast<Int<T>>(c) - IntVec<T>{};
#pragma GCC unroll 2
    for (int64_t p = 0; p < count; p += kLanes<T>) {
      const Vec<T> probability = probabilities(c, p);
      if (kKind == Kind::kProbabilities) {
        const Vec<T> share = load(target.data + c * target.stride + p) * scale + shift;
        keep(c, p, (probability * load(target_sum + p) - share) * load(grad + p));
        continue;
      }
      keep(c, p,
           gradient_of_labels<T, kKind>(probability, load_labels<T>(labels + p) == label, load(grad_of_label + p),
                                        load(grad + p), shift_sum, shift));
    }
  }
}

// The same where a pixel's classes are neighbours in memory, for `count` pixels of the tile from `first` on: vectors
// run along the classes, of which there is at least one vector, and nothing is transposed.
template <class T, Kind kKind>
void differentiate_pixels(const Tile<T>& tile, const ClassTerms<T>& terms, int64_t first, int64_t count,
                          const T* logits, int64_t logits_step, T* gradient, int64_t gradient_step) {
  IntVec<T> lanes;
  for (int lane = 0; lane < kLanes<T>; ++lane) lanes[lane] = lane;
  const int64_t last = tile.classes - kLanes<T>;
  const Vec<T> shift_sum = broadcast<T>(terms.shift_sum);
  for (int64_t p = first; p < first + count; ++p, logits += logits_step, gradient += gradient_step) {
    const Vec<T> largest = broadcast(tile.largest[p]), log_sum = broadcast(tile.log_sum[p]);
    const Vec<T> grad = broadcast(tile.grad[p]), grad_of_label = broadcast(tile.grad_of_label[p]);
    const IntVec<T> label = tile.labels[p] - lanes;
    for (int64_t i = 0; i < tile.classes; i += kLanes<T>) {
      const int64_t c = i < last ? i : last;  // the last vector may overlap the one before
      const Vec<T> probability = exp_of_nonpositive<T>((load(logits + c) - largest) - log_sum);
      store(gradient + c, gradient_of_labels<T, kKind>(probability, label == static_cast<Int<T>>(c) - IntVec<T>{},
                                                       grad_of_label, grad, shift_sum, load(terms.shift + c)));
    }
  }
}

}  // namespace
}  // namespace FASTSEG_ISA
}  // namespace fastseg

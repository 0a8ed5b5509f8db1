// cross_entropy's CPU kernels. For a pixel with logits x, with m = max(x), s = log(sum(exp(x - m))) and the target
// distribution q (a weighted one-hot vector, smoothed or not, or weighted class probabilities):
//   loss = -sum(q * (x - m - s))      d loss / dx = exp(x - m - s) * sum(q) - q
// Forward reads the logits once and keeps m and s; backward reads the logits once and writes the gradient once.
#include "core/cache.h"
#include "core/integers.h"
#include "core/parallel.h"
#include "loss/cross_entropy_loops-inl.h"
#include "loss/losses.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

// ---- the pixels of a call, cut into tiles ----

constexpr int64_t kMaxTilePixels = 2048;  // whose arrays of one number a pixel fit L1
// Each task's sums are added in the order of the tasks, so that results don't depend on the number of threads.
constexpr int64_t kMaxTasks = 1024;

enum Role { kInput, kTarget, kGradOutput, kGradInput, kRoles };

// All dimensions but the classes', outermost first, merged wherever the strides of every tensor allow.
struct Pixels {
  int64_t count = 1;
  int ndim = 0;
  int64_t size[kMaxDims];
  int64_t stride[kMaxDims][kRoles];

  int64_t inner_stride(Role role) const { return stride[ndim - 1][role]; }

  // The tensors in the order of Role; null for one that the call has not. Those with input's rank have classes.
  explicit Pixels(const Tensor* const (&tensors)[kRoles]) {
    const Tensor& input = *tensors[kInput];
    for (int d = 0; d < input.ndim; ++d) {
      if (d == 1) continue;
      count *= input.size[d];
      if (input.size[d] != 1) append(tensors, d);
    }
    if (ndim == 0) append(tensors, 0);  // a single pixel
  }

 private:
  void append(const Tensor* const (&tensors)[kRoles], int d) {
    const int64_t length = tensors[kInput]->size[d];
    int64_t next[kRoles];
    bool mergeable = ndim > 0;
    for (int r = 0; r < kRoles; ++r) {
      const Tensor* tensor = tensors[r];
      const bool given = tensor != nullptr && tensor->ndim > 0;
      const bool has_classes = given && tensor->ndim == tensors[kInput]->ndim;
      next[r] = given ? tensor->stride[d > 0 && !has_classes ? d - 1 : d] : 0;
      mergeable = mergeable && stride[ndim - 1][r] == next[r] * length;
    }
    if (!mergeable) size[ndim++] = 1;
    size[ndim - 1] *= length;
    memcpy(stride[ndim - 1], next, sizeof next);
  }
};

// Consecutive pixels at one distance from each other in every tensor.
struct Run {
  int64_t first, length;   // within the tile
  int64_t offset[kRoles];  // of the first pixel, in elements
};

template <class Body>
void for_each_run(const Pixels& pixels, int64_t begin, int64_t count, Body body) {
  int64_t index[kMaxDims];
  for (int d = pixels.ndim - 1; d >= 0; --d) {
    index[d] = begin % pixels.size[d];
    begin /= pixels.size[d];
  }
  const int inner = pixels.ndim - 1;
  for (int64_t done = 0; done < count;) {
    Run run = {done, min_of(count - done, pixels.size[inner] - index[inner]), {}};
    for (int d = 0; d <= inner; ++d)
      for (int r = 0; r < kRoles; ++r) run.offset[r] += index[d] * pixels.stride[d][r];
    body(run);
    done += run.length;
    index[inner] += run.length;
    for (int d = inner; d > 0 && index[d] == pixels.size[d]; --d) {
      index[d] = 0;
      ++index[d - 1];
    }
  }
}

// The partition of a call's pixels into tasks and tiles, from its shape alone.
struct Plan {
  int64_t classes;
  int64_t tile_pixels, tile_stride;  // a tile's pixels, and the distance of its rows in scratch memory
  int64_t task_pixels, tasks;

  template <class T>
  static Plan of(const CrossEntropy& call, const Pixels& pixels, bool probabilities) {
    Plan plan;
    plan.classes = call.input.size[1];
    const int64_t pixel_bytes = plan.classes * static_cast<int64_t>(sizeof(T)) * (probabilities ? 2 : 1);
    const int64_t fitting = kPixelTileBytes / pixel_bytes / kPixelMultiple * kPixelMultiple;
    plan.tile_pixels = fitting < kPixelMultiple ? kPixelMultiple : min_of(fitting, kMaxTilePixels);
    plan.tile_pixels = min_of(plan.tile_pixels, round_up(pixels.count, kPixelMultiple));
    plan.tile_stride = plan.tile_pixels + kRowPadding;
    const int64_t tiles = plan.tile_pixels == 0 ? 0 : round_up(pixels.count, plan.tile_pixels) / plan.tile_pixels;
    plan.task_pixels = round_up(tiles, kMaxTasks) / kMaxTasks * plan.tile_pixels;
    plan.tasks = tiles == 0 ? 0 : round_up(pixels.count, plan.task_pixels) / plan.task_pixels;
    return plan;
  }
};

// rows[c * stride + p] = the tensor's value for class c and the tile's pixel p, up to whole vectors filled with zeros.
template <class T>
void pack_tile(const Tensor& tensor, Role role, const Pixels& pixels, int64_t begin, int64_t count, T* rows,
               int64_t stride) {
  const int64_t classes = tensor.size[1];
  for_each_run(pixels, begin, count, [&](const Run& run) {
    pack(at(tensor, run.offset[role]), tensor.dtype, classes, run.length, tensor.stride[1], pixels.inner_stride(role),
         rows + run.first, stride);
  });
  const int64_t padding = round_up(count, kPixelMultiple) - count;
  if (padding == 0) return;
  for (int64_t c = 0; c < classes; ++c) memset(rows + c * stride + count, 0, padding * sizeof(T));
}

// The inverse of pack_tile.
template <class T>
void unpack_tile(const T* rows, int64_t stride, const Tensor& tensor, Role role, const Pixels& pixels, int64_t begin,
                 int64_t count) {
  for_each_run(pixels, begin, count, [&](const Run& run) {
    unpack(rows + run.first, stride, tensor.size[1], run.length, at_mutable(tensor, run.offset[role]), tensor.dtype,
           tensor.stride[1], pixels.inner_stride(role));
  });
}

// The labels of a tile, padded with kIgnored. False, and *invalid says which, where one is no class.
template <class I>
bool read_labels(const CrossEntropy& call, const Pixels& pixels, int64_t begin, int64_t count, I* labels,
                 InvalidLabel* invalid) {
  for_each_run(pixels, begin, count, [&](const Run& run) {
    read_label_run(call, run.offset[kTarget], run.length, pixels.inner_stride(kTarget), labels + run.first, invalid);
  });
  for (int64_t p = count; p < round_up(count, kPixelMultiple); ++p) labels[p] = kIgnored;
  return !invalid->found;
}

// Calls body(tile, terms, begin, count, partial) for each tile of each task, of labels having read them; of a task
// until one is no class. partials: [kMaxTasks], one a task. Returns how many tasks there are.
template <class T, Kind kKind, class Body>
int64_t for_each_tile(const CrossEntropy& call, const Pixels& pixels, Partial* partials, Body body) {
  constexpr bool kProbabilities = kKind == Kind::kProbabilities;
  const Plan plan = Plan::of<T>(call, pixels, kProbabilities);
  const int64_t tile_elements = Tile<T>::elements(plan.classes, plan.tile_stride, kProbabilities);
  const int64_t elements = tile_elements + ClassTerms<T>::elements(plan.classes);
  memset(partials, 0, plan.tasks * sizeof(Partial));
  for_each_task(plan.tasks, call.threads, [&](int64_t task) {
    T* const memory = static_cast<T*>(scratch(elements * static_cast<int64_t>(sizeof(T))));
    if (memory == nullptr) return false;
    const Tile<T> tile(plan.classes, plan.tile_stride, kProbabilities, memory);
    const ClassTerms<T> terms(call, memory + tile_elements);
    Partial* const partial = &partials[task];
    const int64_t end = min_of(pixels.count, (task + 1) * plan.task_pixels);
    for (int64_t begin = task * plan.task_pixels; begin < end; begin += plan.tile_pixels) {
      const int64_t count = min_of(plan.tile_pixels, end - begin);
      if (!kProbabilities && !read_labels(call, pixels, begin, count, tile.labels, &partial->invalid)) break;
      body(tile, terms, begin, count, partial);
    }
    return true;
  });
  return plan.tasks;
}

// Calls run with the call's Instance.
template <class Run>
void with_instance(const CrossEntropy& call, const Run& run) {
  if (call.target.ndim == call.input.ndim) return with_type<Kind::kProbabilities>(call, run);
  return with_labels(call, run);
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
void forward(const CrossEntropyForward& call) {
  constexpr bool kProbabilities = kKind == Kind::kProbabilities;
  const Tensor* const tensors[kRoles] = {&call.input, &call.target, nullptr, nullptr};
  const Pixels pixels(tensors);
  const bool dense_classes =
      !kProbabilities && classes_are_dense<T>(call.input) && call.input.size[1] >= kLeastClassVectors * kLanes<T>;
  const auto reduce_tile = [&](const Tile<T>& tile, const ClassTerms<T>& terms, int64_t begin, int64_t count,
                               Partial* partial) __attribute__((always_inline)) {
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
      reduce_classes<T, kKind>(tile, terms, count);
    }
    finish_pixels<T, kKind>(call, tile, terms, begin, count, pixels.count, partial);
  };
  Partial partials[kMaxTasks];
  const int64_t tasks = for_each_tile<T, kKind>(call, pixels, partials, reduce_tile);
  store_totals<T>(call, partials, tasks, kKind == Kind::kSmoothedLabels);
}

// ---- backward ----

// The tile's rows where they lie in the tensor's memory as in scratch: dense along the pixels, of type T, in whole
// vectors. Else null.
template <class T>
Rows<T> rows_in_place(const Tensor& tensor, Role role, const Pixels& pixels, int64_t begin, int64_t count) {
  const int64_t inner = pixels.size[pixels.ndim - 1];
  Rows<T> rows = {nullptr, tensor.stride[1]};
  if (tensor.dtype == kDType<T> && pixels.inner_stride(role) == 1 && count % kLanes<T> == 0 &&
      begin / inner == (begin + count - 1) / inner)
    for_each_run(pixels, begin, count,
                 [&](const Run& run) { rows.data = static_cast<T*>(tensor.data) + run.offset[role]; });
  return rows;
}

// The tile's rows, in place or else packed into the buffer.
template <class T>
Rows<const T> rows_of(const Tensor& tensor, Role role, const Pixels& pixels, int64_t begin, int64_t count, T* buffer,
                      int64_t stride) {
  const Rows<T> rows = rows_in_place<T>(tensor, role, pixels, begin, count);
  if (rows.data != nullptr) return {rows.data, rows.stride};
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
void backward(const CrossEntropyBackward& call) {
  constexpr bool kProbabilities = kKind == Kind::kProbabilities;
  const Tensor* const tensors[kRoles] = {&call.input, &call.target, &call.grad_output, &call.grad_input};
  const Pixels pixels(tensors);
  const bool dense_classes =
      !kProbabilities && classes_are_dense<T>(call.input) && classes_are_dense<T>(call.grad_input);
  const T* const statistics = static_cast<const T*>(call.statistics.data);
  const auto differentiate_tile = [&](const Tile<T>& tile, const ClassTerms<T>& terms, int64_t begin, int64_t count,
                                      Partial*) __attribute__((always_inline)) {
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
      return;
    }
    const Rows<const T> logits = rows_of(call.input, kInput, pixels, begin, count, tile.logits, tile.stride);
    Rows<const T> target = {nullptr, 0};
    if (kProbabilities) target = rows_of(call.target, kTarget, pixels, begin, count, tile.probabilities, tile.stride);
    weigh_pixels<T, kKind>(tile, terms, target, count);
    Rows<T> gradient = rows_in_place<T>(call.grad_input, kGradInput, pixels, begin, count);
    const bool in_place = gradient.data != nullptr;
    if (!in_place) gradient = {tile.logits, tile.stride};
    const auto logits_at = [=](int64_t c, int64_t p) { return load(logits.data + c * logits.stride + p); };
    differentiate<T, kKind>(tile, terms, probabilities_of(tile, logits_at), target, count, KeepInRows<T>{gradient});
    if (!in_place) unpack_tile(tile.logits, tile.stride, call.grad_input, kGradInput, pixels, begin, count);
  };
  Partial partials[kMaxTasks];
  report_invalid(call, partials, for_each_tile<T, kKind>(call, pixels, partials, differentiate_tile));
}

}  // namespace

void cross_entropy_forward(const CrossEntropyForward& call) {
  with_instance(call, [&](auto of) { forward<typename decltype(of)::T, of.kKind>(call); });
}

void cross_entropy_backward(const CrossEntropyBackward& call) {
  with_instance(call, [&](auto of) { backward<typename decltype(of)::T, of.kKind>(call); });
}

}  // namespace FASTSEG_ISA
}  // namespace fastseg

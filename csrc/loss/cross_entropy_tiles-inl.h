// How cross_entropy's kernels walk over their tensors: the pixels of a call, cut into tiles.
#pragma once

#include "core/cache.h"
#include "core/integers.h"
#include "core/parallel.h"
#include "loss/cross_entropy_loops-inl.h"
#include "simd/pack-inl.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

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

// Calls body(begin, count) for each tile of a task until one returns false.
template <class Body>
bool for_each_tile(const Plan& plan, const Pixels& pixels, int64_t task, Body body) {
  const int64_t end = min_of(pixels.count, (task + 1) * plan.task_pixels);
  for (int64_t begin = task * plan.task_pixels; begin < end; begin += plan.tile_pixels)
    if (!body(begin, min_of(plan.tile_pixels, end - begin))) return false;
  return true;
}

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

// Whether a tile's rows lie in the tensor's memory as in scratch: dense along the pixels, of type T, in whole vectors.
template <class T>
bool is_row_major(const Tensor& tensor, Role role, const Pixels& pixels, int64_t begin, int64_t count) {
  const int64_t inner = pixels.size[pixels.ndim - 1];
  return tensor.dtype == kDType<T> && pixels.inner_stride(role) == 1 && count % kLanes<T> == 0 &&
         begin / inner == (begin + count - 1) / inner;
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

// The calling thread's scratch memory for a tile and the class terms; null where memory ran out.
template <class T>
T* tile_memory(const Plan& plan, bool probabilities) {
  const int64_t elements =
      Tile<T>::elements(plan.classes, plan.tile_stride, probabilities) + ClassTerms<T>::elements(plan.classes);
  return static_cast<T*>(scratch(elements * static_cast<int64_t>(sizeof(T))));
}

}  // namespace
}  // namespace FASTSEG_ISA
}  // namespace fastseg

// What upsample_cross_entropy's two kernels share: the memory of a block of pixels, whose arithmetic is
// cross_entropy's.
#pragma once

#include "loss/cross_entropy_loops-inl.h"
#include "loss/upsample_cross_entropy.h"
#include "upsampling/upsampled_rows-inl.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

constexpr int kOverlapSums = 3;

// The sums of every band, zero to begin with: of losses and weights, and where asked of the overlap.
class BandSums {
 public:
  explicit BandSums(int64_t bands, int64_t overlap_sums = 0) : bands_(bands), memory_(bytes(bands, overlap_sums)) {
    memset(memory_.data(), 0, bytes(bands, overlap_sums));
  }
  Partial* partials() const { return static_cast<Partial*>(memory_.data()); }          // [bands]
  double* overlaps() const { return reinterpret_cast<double*>(partials() + bands_); }  // [bands][overlap_sums]

 private:
  int64_t bands_;
  Workspace memory_;

  static int64_t bytes(int64_t bands, int64_t overlap_sums) {
    return bands * static_cast<int64_t>(sizeof(Partial) + overlap_sums * sizeof(double));
  }
};

// Reads the labels of an output row's columns [x, x + count), up to whole blocks filled with kIgnored.
template <class T>
bool read_labels(const CrossEntropy& call, int64_t image, int64_t y, int64_t x, int64_t count, Int<T>* labels,
                 InvalidLabel* invalid) {
  const Tensor& target = call.target;
  const int64_t offset = image * target.stride[0] + y * target.stride[1] + x * target.stride[2];
  for (int64_t p = count; p < round_up(count, kPixelMultiple); ++p) labels[p] = kIgnored;
  return read_label_run(call, offset, count, target.stride[2], labels, invalid);
}

}  // namespace
}  // namespace FASTSEG_ISA
}  // namespace fastseg

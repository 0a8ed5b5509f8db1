// What the kernels of upsample_cross_entropy and upsample_sigmoid_sums share: the sums of bands, and a row's labels.
#pragma once

#include "loss/cross_entropy_loops-inl.h"
#include "loss/upsample_cross_entropy.h"
#include "upsampling/upsampled_rows-inl.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

constexpr int kOverlapSums = 3;

// The sums of every band, zero to begin with: of losses and weights, and where asked of each class.
class BandSums {
 public:
  explicit BandSums(int64_t bands, int64_t class_sums = 0) : bands_(bands), memory_(bytes(bands, class_sums)) {
    memset(memory_.data(), 0, bytes(bands, class_sums));
  }
  Partial* partials() const { return static_cast<Partial*>(memory_.data()); }            // [bands]
  double* of_classes() const { return reinterpret_cast<double*>(partials() + bands_); }  // [bands][class_sums]

 private:
  int64_t bands_;
  Workspace memory_;

  static int64_t bytes(int64_t bands, int64_t class_sums) {
    return bands * static_cast<int64_t>(sizeof(Partial) + class_sums * sizeof(double));
  }
};

// target [sums, N, C] = the sums of its image's bands, [bands][sums][C].
template <class T>
void store_class_sums(const Tensor& target, const UpsampledMap<T>& map, const Bands& bands, const double* of_bands) {
  const int64_t images = map.images, classes = map.classes, sums = target.size[0] * classes;
  const int64_t per_image = bands.per_plane * map.output_depth;
  for (int64_t image = 0; image < images; ++image)
    for (int64_t i = 0; i < sums; ++i) {
      double sum = 0;
      for (int64_t band = image * per_image; band < (image + 1) * per_image; ++band) sum += of_bands[band * sums + i];
      static_cast<T*>(target.data)[(i / classes * images + image) * classes + i % classes] = static_cast<T>(sum);
    }
}

// Reads the labels of an output row's columns [x, x + count), up to whole blocks filled with kIgnored.
template <class T>
bool read_labels(const CrossEntropy& call, const UpsampledMap<T>& map, int64_t plane, int64_t y, int64_t x,
                 int64_t count, Int<T>* labels, InvalidLabel* invalid) {
  const Tensor& target = call.target;
  const int64_t offset = map.offset_of(target, plane, y, x);
  for (int64_t p = count; p < round_up(count, kPixelMultiple); ++p) labels[p] = kIgnored;
  return read_label_run(call, offset, count, target.stride[target.ndim - 1], labels, invalid);
}

}  // namespace
}  // namespace FASTSEG_ISA
}  // namespace fastseg

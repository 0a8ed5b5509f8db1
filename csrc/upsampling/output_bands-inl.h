// How the work on an upsampled map is divided into bands of its rows: their memory, their sums, and a row's labels.
#pragma once

#include "loss/cross_entropy_terms-inl.h"
#include "upsampling/upsampled_rows-inl.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

// Bands of output rows, none across two planes, by the shape alone: sums over a band don't depend on who computes it.
constexpr int64_t kBands = 64;          // enough for the threads of a large machine
constexpr int64_t kLeastBandRows = 32;  // of the output: few input rows are to be expanded for two bands

struct Bands {
  int64_t rows, per_plane, count;

  template <class T>
  explicit Bands(const UpsampledMap<T>& map)
      : rows(max_of(ceil_div(map.output_planes() * map.output_height, kBands), kLeastBandRows)),
        per_plane(ceil_div(map.output_height, rows)),
        count(map.output_planes() * per_plane) {}
};

// Calls body(plane, y, pair, begin, count) for every output row of a band and every tile of it, until one returns
// false.
template <class T, class Body>
void for_each_tile_row(const UpsampledMap<T>& map, const Bands& bands, int64_t band, ExpandedRows<T>* source,
                       Body body) {
  const int64_t plane = band / bands.per_plane, first = band % bands.per_plane * bands.rows;
  const int64_t last = min_of(first + bands.rows, map.output_height);
  for (int64_t begin = 0; begin < map.output_width; begin += map.tile_columns) {
    const int64_t count = min_of(map.tile_columns, map.output_width - begin);
    source->select(plane, begin, count);
    for (int64_t y = first; y < last; ++y)
      if (!body(plane, y, RowPair<T>(map, source, map.rows[y]), begin, count)) return;
  }
}

// Pieces of a thread's scratch memory, each on cache lines of its own: so many elements, padded, in all.
template <class T>
class Pieces {
 public:
  explicit Pieces(void* memory) : next_(static_cast<T*>(memory)) {}
  static int64_t padded(int64_t elements) { return round_up(elements, 64 / sizeof(T)); }
  T* take(int64_t elements) {
    T* piece = next_;
    next_ += padded(elements);
    return piece;
  }

 private:
  T* next_;
};

// Calls body(source, pieces) with expanded rows in scratch memory, and pieces of `elements` beside them. False where
// memory ran out.
template <class T, class Body>
bool with_expanded_rows(const UpsampledMap<T>& map, const Tensor& input, bool relative, int64_t elements, Body body) {
  const int64_t of_rows = ExpandedRows<T>::elements(map);
  void* const memory = scratch((Pieces<T>::padded(of_rows) + elements) * static_cast<int64_t>(sizeof(T)));
  if (memory == nullptr) return false;
  Pieces<T> pieces(memory);
  ExpandedRows<T> source(map, input, relative, pieces.take(of_rows));
  body(&source, &pieces);
  return true;
}

// ---- losses ----

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

// upsample_cross_entropy's forward kernel: a block of an output row's pixels is upsampled into the first-level cache,
// where cross_entropy's loops reduce it. What leaves the cache are the two statistics of each pixel.
#include "upsample_cross_entropy.h"

#include "upsample_cross_entropy_tiles.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

constexpr int kRowsInCache = 2;  // a tile's two expanded input rows

// Pixels of an output row that are worked on together, so that their logits stay in the first-level cache.
template <class T>
int64_t block_columns(const UpsampledMap<T>& map) {
  constexpr int64_t kBlockBytes = 16 * 1024;
  const int64_t fitting = kBlockBytes / (map.classes * static_cast<int64_t>(sizeof(T))) / kColumnMultiple;
  return least(most(fitting, 1) * kColumnMultiple, map.tile_columns);
}

template <class T>
int64_t block_stride(const UpsampledMap<T>& map) {
  return block_columns(map) + kRowPadding;
}

// What the tasks share.
template <class T>
struct Shared {
  const UpsampledMap<T>& map;
  const Bands& bands;
  Partial* partials;  // [bands]
  double* overlaps;   // [bands][3][classes], or null
};

// Adds the probabilities of a block's pixels that aren't ignored to the sums [3][classes] over a band. The block's
// logits become probabilities.
template <class T>
void add_overlap(const Tile<T>& tile, int64_t count, double* overlap) {
  for (int64_t c = 0; c < tile.classes; ++c) {
    T* const row = tile.logits + c * tile.stride;
    Vec<T> predicted = {};
    for (int64_t p = 0; p < count; p += kLanes<T>) {
      IntVec<T> labels;
      memcpy(&labels, tile.labels + p, sizeof labels);
      const Vec<T> probability =
          exp_of_nonpositive<T>((load(row + p) - load(tile.largest + p)) - load(tile.log_sum + p));
      store(row + p, probability);
      predicted += select_or_zero<T>(labels != kIgnored, probability);
    }
    T lanes[kLanes<T>];
    store(lanes, predicted);
    for (T lane : lanes) overlap[tile.classes + c] += static_cast<double>(lane);
  }
  for (int64_t p = 0; p < count; ++p) {
    const Int<T> label = tile.labels[p];
    if (label == kIgnored) continue;
    overlap[label] += static_cast<double>(tile.logits[label * tile.stride + p]);
    overlap[2 * tile.classes + label] += 1;
  }
}

template <class T, Kind kKind>
bool forward_band(const UpsampleCrossEntropyForward& call, const Shared<T>& shared, int64_t band) {
  const UpsampledMap<T>& map = shared.map;
  const auto padded = Pieces<T>::padded;
  const int64_t stride = block_stride(map), tile_elements = Tile<T>::elements(map.classes, stride, false);
  const int64_t elements =
      padded(ExpandedRows<T>::elements(map)) + padded(tile_elements) + padded(ClassTerms<T>::elements(map.classes));
  void* const memory = scratch(elements * static_cast<int64_t>(sizeof(T)));
  if (memory == nullptr) return false;
  Pieces<T> pieces(memory);
  ExpandedRows<T> source(map, call.input, pieces.take(ExpandedRows<T>::elements(map)));
  const Tile<T> tile(map.classes, stride, false, pieces.take(tile_elements));
  const ClassTerms<T> terms(call, pieces.take(ClassTerms<T>::elements(map.classes)));
  Partial* const partial = &shared.partials[band];
  double* const overlap = shared.overlaps == nullptr ? nullptr : shared.overlaps + band * kOverlapSums * map.classes;
  const int64_t block = block_columns(map), pixels = map.images * map.output_height * map.output_width;
  for_each_tile_row(map, shared.bands, band, &source,
                    [&](int64_t image, int64_t y, const RowPair<T>& pair, int64_t begin, int64_t columns) {
                      for (int64_t x = 0; x < columns; x += block) {
                        const int64_t count = least(block, columns - x);
                        if (!read_labels<T>(call, image, y, begin + x, count, tile.labels, &partial->invalid))
                          return false;
                        with_upsampled_row(map, pair, x, [&](const auto row) {
                          reduce_classes<T, kKind>(tile, terms, count, [&tile, row](int64_t c, int64_t p) {
                            const Vec<T> logits = row(c, p);
                            store(tile.logits + c * tile.stride + p, logits);
                            return logits;
                          });
                        });
                        finish_pixels<T, kKind>(tile, terms, count);
                        if (overlap != nullptr) add_overlap(tile, count, overlap);
                        const int64_t first = (image * map.output_height + y) * map.output_width + begin + x;
                        T* const statistics = static_cast<T*>(call.statistics.data) + first;
                        memcpy(statistics, tile.largest, count * sizeof(T));
                        memcpy(statistics + pixels, tile.log_sum, count * sizeof(T));
                        if (call.reduction == Reduction::kNone)
                          memcpy(static_cast<T*>(call.loss.data) + first, tile.loss, count * sizeof(T));
                        partial->loss += sum_of(tile.loss, count);
                        partial->weight += sum_of(tile.weight, count);
                      }
                      return true;
                    });
  return true;
}

// overlap = the sum of its image's bands.
template <class T>
void store_overlap(const UpsampleCrossEntropyForward& call, const Shared<T>& shared) {
  const int64_t images = shared.map.images, classes = shared.map.classes;
  T* const target = static_cast<T*>(call.overlap.data);
  for (int64_t image = 0; image < images; ++image)
    for (int64_t i = 0; i < kOverlapSums * classes; ++i) {
      double sum = 0;
      for (int64_t band = image * shared.bands.per_image; band < (image + 1) * shared.bands.per_image; ++band)
        sum += shared.overlaps[band * kOverlapSums * classes + i];
      target[(i / classes * images + image) * classes + i % classes] = static_cast<T>(sum);
    }
}

template <class T, Kind kKind>
void forward(const UpsampleCrossEntropyForward& call) {
  const int64_t output_height = call.target.size[1], output_width = call.target.size[2];
  const Bands bands(call.input.size[0], output_height);
  const Workspace tables(UpsampledMap<T>::table_bytes(output_height, output_width));
  const UpsampledMap<T> map(call.grid, call.input, output_height, output_width, kRowsInCache, tables.data());
  const bool with_overlap = call.overlap.size[0] > 0;
  const int64_t partial_bytes = bands.count * static_cast<int64_t>(sizeof(Partial));
  const int64_t overlap_elements = with_overlap ? bands.count * kOverlapSums * map.classes : 0;
  const int64_t bytes = partial_bytes + overlap_elements * static_cast<int64_t>(sizeof(double));
  const Workspace sums(bytes);
  memset(sums.data(), 0, bytes);
  Partial* const partials = static_cast<Partial*>(sums.data());
  double* const overlaps = with_overlap ? reinterpret_cast<double*>(partials + bands.count) : nullptr;
  const Shared<T> shared = {map, bands, partials, overlaps};
  for_each_task(bands.count, call.threads, [&](int64_t band) { return forward_band<T, kKind>(call, shared, band); });
  store_totals<T>(call, partials, bands.count, kKind == Kind::kSmoothedLabels);
  if (with_overlap) store_overlap(call, shared);
}

}  // namespace

void upsample_cross_entropy_forward(const UpsampleCrossEntropyForward& call) {
  const bool wide = call.input.dtype == DType::kFloat64;
  if (call.label_smoothing > 0)
    return wide ? forward<double, Kind::kSmoothedLabels>(call) : forward<float, Kind::kSmoothedLabels>(call);
  return wide ? forward<double, Kind::kLabels>(call) : forward<float, Kind::kLabels>(call);
}

}  // namespace FASTSEG_ISA
}  // namespace fastseg

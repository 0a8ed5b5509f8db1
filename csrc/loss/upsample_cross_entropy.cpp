// upsample_cross_entropy's forward kernel. The input's logits are taken relative to their pixel's largest, which
// changes no softmax: then no upsampled logit is positive, and one pass over the classes, without their maximum, sums
// the exponentials. What leaves the cache are the two statistics of each pixel.
#include "loss/upsample_cross_entropy.h"

#include "core/cache.h"
#include "loss/upsample_cross_entropy_tiles-inl.h"
#include "upsampling/upsampled_gradient-inl.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

constexpr int kRowsInCache = 2;  // a tile's two expanded input rows

// Pixels of an output row that are worked on together, so that their logits stay in the first-level cache.
template <class T>
int64_t block_columns(const UpsampledMap<T>& map) {
  const int64_t fitting = kPixelBlockBytes / (map.classes * static_cast<int64_t>(sizeof(T))) / kPixelMultiple;
  return min_of(max_of(fitting, 1) * kPixelMultiple, map.tile_columns);
}

template <class T>
int64_t block_stride(const UpsampledMap<T>& map) {
  return block_columns(map) + kRowPadding;
}

// A sum of exponentials below this is made again, relative to the largest of them, so that none that counts underflows.
template <class T>
constexpr T kLeastSum = sizeof(T) == sizeof(float) ? T(1e-30) : T(1e-290);

// As cross_entropy's reduce_classes, in one pass over the classes: the logits are relative to bounds of their pixels'
// largest, which lie far above these where neighbouring pixels of the input are sure of different classes. Also puts
// 1 / sum(exp(x - m)) into target_sum.
template <class T, Kind kKind, class Logits, class Keep>
FASTSEG_NOINLINE void reduce_relative(const Tile<T>& tile, const ClassTerms<T>& terms, int64_t count,
                                      const Logits logits, const Keep keep) {
  constexpr int kVectors = 2;  // as many as leave exp's constants in registers
  constexpr int64_t kBlock = kVectors * kLanes<T>;
  const int64_t classes = tile.classes;
  const Int<T>* const labels = tile.labels;
  for (int64_t p = 0; p < count; p += kBlock) {
    Vec<T> largest[kVectors] = {}, sum[kVectors], spread[kVectors];
    const auto add_up = [&](const auto relative_logits) {
      for (int i = 0; i < kVectors; ++i) sum[i] = spread[i] = Vec<T>{};
      for (int64_t c = 0; c < classes; ++c)
        for (int i = 0; i < kVectors; ++i) {
          const Vec<T> difference = relative_logits(c, i);
          const Vec<T> exponential = exp_of_nonpositive<T>(difference);
          keep(c, p + i * kLanes<T>, exponential);
          sum[i] += exponential;
          if (kKind == Kind::kSmoothedLabels) spread[i] += difference * terms.shift[c];
        }
    };
    add_up([&](int64_t c, int i) { return logits(c, p + i * kLanes<T>); });
    if (any<T>((sum[0] < kLeastSum<T>) | (sum[1] < kLeastSum<T>))) {
      for (int i = 0; i < kVectors; ++i) largest[i] = logits(0, p + i * kLanes<T>);
      for (int64_t c = 1; c < classes; ++c)
        for (int i = 0; i < kVectors; ++i) largest[i] = maximum<T>(largest[i], logits(c, p + i * kLanes<T>));
      add_up([&](int64_t c, int i) { return logits(c, p + i * kLanes<T>) - largest[i]; });
    }
    for (int64_t lane = p; lane < p + kBlock; ++lane)
      tile.loss[lane] = logits.at(labels[lane] == kIgnored ? 0 : labels[lane], lane);
    for (int i = 0; i < kVectors; ++i) {
      const int64_t at = p + i * kLanes<T>;
      const Vec<T> log_sum = log_of_positive<T>(sum[i]);
      store(tile.target_sum + at, T(1) / sum[i]);
      store(tile.largest + at, largest[i]);
      store(tile.log_sum + at, log_sum);
      if (kKind == Kind::kSmoothedLabels) store(tile.spread + at, spread[i] - log_sum * terms.shift_sum);
    }
  }
}

// Adds the probabilities of a block's pixels that aren't ignored to the sums [3][classes] over a band. The block's
// exponentials become probabilities.
template <class T>
void add_overlap(const Tile<T>& tile, int64_t count, double* overlap) {
  for (int64_t c = 0; c < tile.classes; ++c) {
    T* const row = tile.logits + c * tile.stride;
    Vec<T> predicted = {};
    for (int64_t p = 0; p < count; p += kLanes<T>) {
      const Vec<T> probability = load(row + p) * load(tile.target_sum + p);
      store(row + p, probability);
      predicted += select_or_zero<T>(load_labels<T>(tile.labels + p) != kIgnored, probability);
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

// A block of an output row's pixels: their losses and statistics.
template <class T, Kind kKind>
class Blocks {
 public:
  static int64_t elements(const UpsampledMap<T>& map) {
    return Pieces<T>::padded(Tile<T>::elements(map.classes, block_stride(map), false)) +
           Pieces<T>::padded(ClassTerms<T>::elements(map.classes));
  }

  // overlap: null where it isn't asked for.
  Blocks(const UpsampleCrossEntropyForward& call, const UpsampledMap<T>& map, Partial* partial, double* overlap,
         Pieces<T>* pieces)
      : call_(call),
        map_(map),
        tile_(map.classes, block_stride(map), false,
              pieces->take(Tile<T>::elements(map.classes, block_stride(map), false))),
        terms_(call, pieces->take(ClassTerms<T>::elements(map.classes))),
        partial_(partial),
        overlap_(overlap) {}

  const Tile<T>& tile() const { return tile_; }
  KeepInRows<T> keep_in_tile() const { return {{tile_.logits, tile_.stride}}; }
  const ClassTerms<T>& terms() const { return terms_; }

  // Columns [x, x + count) of a tile that begins at the output's column `begin`. False where a label is no class.
  template <class Keep>
  bool reduce(int64_t plane, int64_t y, int64_t begin, int64_t x, int64_t count, const RowPair<T>& pair,
              const Keep keep) {
    if (!read_labels<T>(call_, map_, plane, y, begin + x, count, tile_.labels, &partial_->invalid)) return false;
    with_upsampled_row(map_, pair, x,
                       [&](const auto row) { reduce_relative<T, kKind>(tile_, terms_, count, row, keep); });
    finish_pixels<T, kKind>(tile_, terms_, count);
    if (overlap_ != nullptr) add_overlap(tile_, count, overlap_);
    const int64_t first = (plane * map_.output_height + y) * map_.output_width + begin + x;
    if (call_.statistics) {
      T* const statistics = static_cast<T*>(call_.statistics.data) + first;
      memcpy(statistics, tile_.largest, count * sizeof(T));
      memcpy(statistics + map_.output_pixels(), tile_.log_sum, count * sizeof(T));
    }
    if (call_.reduction == Reduction::kNone)
      memcpy(static_cast<T*>(call_.loss.data) + first, tile_.loss, count * sizeof(T));
    partial_->loss += sum_of(tile_.loss, count);
    partial_->weight += sum_of(tile_.weight, count);
    return true;
  }

 private:
  const UpsampleCrossEntropyForward& call_;
  const UpsampledMap<T>& map_;
  const Tile<T> tile_;
  const ClassTerms<T> terms_;
  Partial* const partial_;
  double* const overlap_;
};

// ---- without a gradient ----

template <class T, Kind kKind>
bool forward_band(const UpsampleCrossEntropyForward& call, const UpsampledMap<T>& map, const Bands& bands, int64_t band,
                  Partial* partial, double* overlap) {
  const int64_t elements = Pieces<T>::padded(ExpandedRows<T>::elements(map)) + Blocks<T, kKind>::elements(map);
  void* const memory = scratch(elements * static_cast<int64_t>(sizeof(T)));
  if (memory == nullptr) return false;
  Pieces<T> pieces(memory);
  ExpandedRows<T> source(map, call.input, true, pieces.take(ExpandedRows<T>::elements(map)));
  Blocks<T, kKind> blocks(call, map, partial, overlap, &pieces);
  const int64_t block = block_columns(map);
  const auto run = [&](const auto keep) {
    for_each_tile_row(map, bands, band, &source,
                      [&](int64_t plane, int64_t y, const RowPair<T>& pair, int64_t begin, int64_t columns) {
                        for (int64_t x = 0; x < columns; x += block)
                          if (!blocks.reduce(plane, y, begin, x, min_of(block, columns - x), pair, keep)) return false;
                        return true;
                      });
  };
  if (overlap == nullptr)
    run(KeepNothing<T>{});
  else
    run(blocks.keep_in_tile());
  return true;
}

template <class T, Kind kKind>
void forward(const UpsampleCrossEntropyForward& call) {
  const UpsampledMap<T> map(call.grid, call.input, call.target, kRowsInCache);
  const Bands bands(map);
  const bool with_overlap = static_cast<bool>(call.overlap);
  const BandSums sums(bands.count, with_overlap ? kOverlapSums * map.classes : 0);
  for_each_task(bands.count, call.threads, [&](int64_t band) {
    double* const overlap = with_overlap ? sums.of_classes() + band * kOverlapSums * map.classes : nullptr;
    return forward_band<T, kKind>(call, map, bands, band, &sums.partials()[band], overlap);
  });
  store_totals<T>(call, sums.partials(), bands.count, kKind == Kind::kSmoothedLabels);
  if (with_overlap) store_class_sums<T>(call.overlap, map, bands, sums.of_classes());
}

// ---- with the gradient ----

// What is done to an output row.
template <class T, Kind kKind>
class GradientRows {
 public:
  static constexpr bool kRelative = true;
  static int64_t elements(const UpsampledMap<T>& map) { return Blocks<T, kKind>::elements(map); }

  GradientRows(const UpsampleCrossEntropyForward& call, const UpsampledMap<T>& map, const Place&, Partial* partial,
               Pieces<T>* pieces)
      : block_(block_columns(map)), blocks_(call, map, partial, nullptr, pieces) {}

  bool row(const Place& place, int64_t y, const RowPair<T>& pair, const GradientsToRows<T>& keep) {
    const Tile<T>& tile = blocks_.tile();
    const KeepInRows<T> kept = blocks_.keep_in_tile();
    const T* const scale = tile.target_sum;
    const auto probabilities = [=](int64_t c, int64_t p) {
      return load(kept.rows.data + c * kept.rows.stride + p) * load(scale + p);
    };
    for (int64_t x = 0; x < place.columns; x += block_) {
      const int64_t count = min_of(block_, place.columns - x);
      if (!blocks_.reduce(place.plane, y, place.column, x, count, pair, kept)) return false;
      const int64_t filled = round_up(count, kPixelMultiple);  // pixels that fill the block up get gradients of zero
      for (int64_t p = 0; p < filled; ++p) tile.grad[p] = 1;
      weigh_pixels<T, kKind>(tile, blocks_.terms(), {nullptr, 0}, filled);
      const auto keep_gradient = [=](int64_t c, int64_t p, Vec<T> gradient) { keep(c, x + p, gradient); };
      differentiate<T, kKind>(tile, blocks_.terms(), probabilities, {nullptr, 0}, count, keep_gradient);
    }
    return true;
  }

 private:
  const int64_t block_;
  Blocks<T, kKind> blocks_;
};

template <class T, Kind kKind>
void forward_with_gradient(const UpsampleCrossEntropyForward& call) {
  const UpsampledMap<T> map(call.grid, call.input, call.target, kGradientRowsInCache);
  const InputBands bands(map);
  const BandSums sums(bands.count);
  sum_gradients<T, GradientRows<T, kKind>>(call, map, bands, call.gradient, sums.partials());
  store_totals<T>(call, sums.partials(), bands.count, kKind == Kind::kSmoothedLabels);
}

}  // namespace

void upsample_cross_entropy_forward(const UpsampleCrossEntropyForward& call) {
  constexpr Kind kLabels = Kind::kLabels, kSmoothed = Kind::kSmoothedLabels;
  const bool wide = call.input.dtype == DType::kFloat64, smoothed = call.label_smoothing > 0;
  if (call.gradient && smoothed)
    return wide ? forward_with_gradient<double, kSmoothed>(call) : forward_with_gradient<float, kSmoothed>(call);
  if (call.gradient)
    return wide ? forward_with_gradient<double, kLabels>(call) : forward_with_gradient<float, kLabels>(call);
  if (smoothed) return wide ? forward<double, kSmoothed>(call) : forward<float, kSmoothed>(call);
  return wide ? forward<double, kLabels>(call) : forward<float, kLabels>(call);
}

}  // namespace FASTSEG_ISA
}  // namespace fastseg

// upsample_cross_entropy's CPU kernels. The input's logits are taken relative to their pixel's largest, which
// changes no softmax: then no upsampled logit is positive, and one pass over the classes, without their maximum, sums
// the exponentials. What leaves the cache are the two statistics of each pixel.
//
// Backward serves gradients that forward has not made: an output row's pixels are upsampled again, and cross_entropy's
// loop gives their gradient.
#include "core/cache.h"
#include "loss/cross_entropy_loops-inl.h"
#include "loss/losses.h"
#include "upsampling/upsampled_gradient-inl.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

constexpr int kRowsInCache = 2;  // a tile's two expanded input rows
constexpr int kOverlapSums = 3;

// Where the exponentials go to that nobody needs again.
template <class T>
struct KeepNothing {
  FASTSEG_INLINE void operator()(int64_t, int64_t, Vec<T>) const {}
};

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
    if (overlap_ != nullptr) add_overlap(tile_, count, overlap_);
    const int64_t first = (plane * map_.output_height + y) * map_.output_width + begin + x;
    finish_pixels<T, kKind>(call_, tile_, terms_, first, count, map_.output_pixels(), partial_);
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
  const int64_t block = block_columns(map), elements = Blocks<T, kKind>::elements(map);
  return with_expanded_rows(map, call.input, true, elements, [&](ExpandedRows<T>* source, Pieces<T>* pieces) {
    Blocks<T, kKind> blocks(call, map, partial, overlap, pieces);
    const auto run = [&](const auto keep) {
      for_each_tile_row(map, bands, band, source,
                        [&](int64_t plane, int64_t y, const RowPair<T>& pair, int64_t begin, int64_t columns) {
                          for (int64_t x = 0; x < columns; x += block)
                            if (!blocks.reduce(plane, y, begin, x, min_of(block, columns - x), pair, keep))
                              return false;
                          return true;
                        });
    };
    if (overlap == nullptr)
      run(KeepNothing<T>{});
    else
      run(blocks.keep_in_tile());
  });
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

// ---- backward ----

// The gradients of the overlap's sums of an image, [classes] each.
template <class T>
struct OverlapGradient {
  T *predicted, *intersected;
};

template <class T>
void read_overlap(const UpsampleCrossEntropyBackward& call, int64_t image, const OverlapGradient<T>& s) {
  const Tensor& grad = call.grad_overlap;
  T* const targets[2] = {s.intersected, s.predicted};
  for (int sum = 0; sum < 2; ++sum)
    pack(at(grad, sum * grad.stride[0] + image * grad.stride[1]), grad.dtype, 1, grad.size[2], 0, grad.stride[2],
         targets[sum], 0);
}

// u, the gradient of a vector of class c's probabilities through the overlap's sums.
template <class T>
FASTSEG_INLINE Vec<T> grad_of_probabilities(const Tile<T>& tile, const OverlapGradient<T>& s, int64_t c, int64_t p) {
  const IntVec<T> is_label = load_labels<T>(tile.labels + p) == static_cast<Int<T>>(c);
  return s.predicted[c] + select_or_zero<T>(is_label, broadcast<T>(s.intersected[c]));
}

// In the tile's logits the probabilities P of the pixels, and in spread sum(P * u); zero where a pixel is ignored.
template <class T, class Probabilities>
void weigh_overlap(const Tile<T>& tile, const OverlapGradient<T>& s, const Probabilities probabilities, int64_t count) {
  for (int64_t p = 0; p < count; p += kLanes<T>) {
    const IntVec<T> counts = load_labels<T>(tile.labels + p) != kIgnored;
    Vec<T> spread = {};
    for (int64_t c = 0; c < tile.classes; ++c) {
      const Vec<T> probability = select_or_zero<T>(counts, probabilities(c, p));
      store(tile.logits + c * tile.stride + p, probability);
      spread += probability * grad_of_probabilities(tile, s, c, p);
    }
    store(tile.spread + p, spread);
  }
}

// The statistics and incoming gradients of an output row's columns [x, x + count). The statistics are filled up with
// zeros: gradients of zero come of them.
template <class T>
void read_grad(const UpsampleCrossEntropyBackward& call, const UpsampledMap<T>& map, int64_t plane, int64_t y,
               int64_t x, int64_t count, const Tile<T>& tile) {
  const int64_t first = (plane * map.output_height + y) * map.output_width + x;
  const T* const statistics = static_cast<const T*>(call.statistics.data) + first;
  memcpy(tile.largest, statistics, count * sizeof(T));
  memcpy(tile.log_sum, statistics + map.output_pixels(), count * sizeof(T));
  for (int64_t p = count; p < round_up(count, kPixelMultiple); ++p) tile.largest[p] = tile.log_sum[p] = 0;
  const Tensor& grad = call.grad_output;
  if (call.reduction == Reduction::kNone) {
    const int64_t offset = map.offset_of(grad, plane, y, x);
    pack(at(grad, offset), grad.dtype, 1, count, 0, grad.stride[grad.ndim - 1], tile.grad, 0);
  } else {
    const T reduced = grad_of_reduced<T>(call);
    for (int64_t p = 0; p < count; ++p) tile.grad[p] = reduced;
  }
}

// What is done to an output row.
template <class T, Kind kKind>
class BackwardRows {
 public:
  static constexpr bool kRelative = true;
  static int64_t elements(const UpsampledMap<T>& map) {
    const auto padded = Pieces<T>::padded;
    return padded(Tile<T>::elements(map.classes, map.row_stride, false)) +
           padded(ClassTerms<T>::elements(map.classes)) + 2 * padded(map.classes);
  }

  BackwardRows(const UpsampleCrossEntropyBackward& call, const UpsampledMap<T>& map, const Place& place,
               Partial* partial, Pieces<T>* pieces)
      : call_(call),
        map_(map),
        tile_(map.classes, map.row_stride, false, pieces->take(Tile<T>::elements(map.classes, map.row_stride, false))),
        terms_(call, pieces->take(ClassTerms<T>::elements(map.classes))),
        overlap_{pieces->take(map.classes), pieces->take(map.classes)},
        with_overlap_(call.grad_overlap),
        invalid_(&partial->invalid) {
    if (with_overlap_) read_overlap(call, place.image, overlap_);
  }

  bool row(const Place& place, int64_t y, const RowPair<T>& pair, const GradientsToRows<T>& keep) {
    const int64_t count = place.columns;
    const Rows<const T> no_target = {nullptr, 0};
    if (!read_labels<T>(call_, map_, place.plane, y, place.column, count, tile_.labels, invalid_)) return false;
    read_grad(call_, map_, place.plane, y, place.column, count, tile_);
    weigh_pixels<T, kKind>(tile_, terms_, no_target, round_up(count, kPixelMultiple));
    with_upsampled_row(map_, pair, 0, [&](const auto logits) {
      const auto probabilities = probabilities_of(tile_, logits);
      if (!with_overlap_) return differentiate<T, kKind>(tile_, terms_, probabilities, no_target, count, keep);
      weigh_overlap(tile_, overlap_, probabilities, count);
      const auto keep_sum = [&](int64_t c, int64_t p, Vec<T> gradient) {
        const Vec<T> u = grad_of_probabilities(tile_, overlap_, c, p) - load(tile_.spread + p);
        keep(c, p, gradient + load(tile_.logits + c * tile_.stride + p) * u);
      };
      differentiate<T, kKind>(tile_, terms_, probabilities, no_target, count, keep_sum);
    });
    return true;
  }

 private:
  const UpsampleCrossEntropyBackward& call_;
  const UpsampledMap<T>& map_;
  const Tile<T> tile_;
  const ClassTerms<T> terms_;
  const OverlapGradient<T> overlap_;
  const bool with_overlap_;
  InvalidLabel* const invalid_;
};

template <class T, Kind kKind>
void backward(const UpsampleCrossEntropyBackward& call) {
  const UpsampledMap<T> map(call.grid, call.input, call.target, kGradientRowsInCache);
  const InputBands bands(map);
  const BandSums sums(bands.count);
  sum_gradients<T, BackwardRows<T, kKind>>(call, map, bands, call.grad_input, sums.partials());
  report_invalid(call, sums.partials(), bands.count);
}

}  // namespace

void upsample_cross_entropy_forward(const UpsampleCrossEntropyForward& call) {
  with_labels(call, [&](auto of) {
    using T = typename decltype(of)::T;
    return call.gradient ? forward_with_gradient<T, of.kKind>(call) : forward<T, of.kKind>(call);
  });
}

void upsample_cross_entropy_backward(const UpsampleCrossEntropyBackward& call) {
  with_labels(call, [&](auto of) { backward<typename decltype(of)::T, of.kKind>(call); });
}

}  // namespace FASTSEG_ISA
}  // namespace fastseg

// upsample_cross_entropy's backward kernel, for gradients that forward has not made: an output row's pixels are
// upsampled again, and cross_entropy's loop gives their gradient.
#include "loss/upsample_cross_entropy.h"
#include "loss/upsample_cross_entropy_tiles-inl.h"
#include "upsampling/upsampled_gradient-inl.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

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
  *call.invalid = {};
  for (int64_t band = 0; band < bands.count; ++band) keep_first(sums.partials()[band].invalid, call.invalid);
}

}  // namespace

void upsample_cross_entropy_backward(const UpsampleCrossEntropyBackward& call) {
  const bool wide = call.input.dtype == DType::kFloat64;
  if (call.label_smoothing > 0)
    return wide ? backward<double, Kind::kSmoothedLabels>(call) : backward<float, Kind::kSmoothedLabels>(call);
  return wide ? backward<double, Kind::kLabels>(call) : backward<float, Kind::kLabels>(call);
}

}  // namespace FASTSEG_ISA
}  // namespace fastseg

// upsample_argmax's kernel: an output row at a time, its pixels' logits never leave the registers.
#include "simd/vector_math-inl.h"
#include "upsampling/argmax_rows-inl.h"
#include "upsampling/predictions.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

// confidence[x] = 1 / sum(exp(logit - largest)), the softmax value of the largest logit, up to kPixelMultiple beyond
// count.
template <class T, class Row>
void confidence_row(const UpsampledMap<T>& map, const Row logits, int64_t count, T* confidence) {
  for (int64_t x = 0; x < count; x += kLanes<T>) {
    Vec<T> largest = logits(0, x), sum = {};
    for (int64_t c = 1; c < map.classes; ++c) largest = maximum<T>(largest, logits(c, x));
    for (int64_t c = 0; c < map.classes; ++c) sum += exp_of_nonpositive<T>(logits(c, x) - largest);
    store(confidence + x, T(1) / sum);
  }
}

template <class T>
bool argmax_band(const UpsampleArgmax& call, const UpsampledMap<T>& map, const Bands& bands, int64_t band) {
  const int64_t elements = 2 * Pieces<T>::padded(map.tile_columns);
  return with_expanded_rows(map, call.input, false, elements, [&](ExpandedRows<T>* source, Pieces<T>* pieces) {
    T* const confidence = pieces->take(map.tile_columns);
    Int<T>* const labels = reinterpret_cast<Int<T>*>(pieces->take(map.tile_columns));
    for_each_tile_row(
        map, bands, band, source, [&](int64_t plane, int64_t y, const RowPair<T>& pair, int64_t begin, int64_t count) {
          const int64_t first = (plane * map.output_height + y) * map.output_width + begin;
          const bool with_confidence = static_cast<bool>(call.confidence);
          with_upsampled_row(map, pair, 0, [&](const auto row) {
            argmax_row(map, pair, row, count, labels);
            if (with_confidence) confidence_row(map, row, count, confidence);
          });
          store_labels(labels, count, call.labels, first);
          if (with_confidence)
            unpack(confidence, 0, 1, count, at_mutable(call.confidence, first), call.confidence.dtype, 0, 1);
          return true;
        });
  });
}

template <class T>
void argmax(const UpsampleArgmax& call) {
  const UpsampledMap<T> map(call.grid, call.input, call.labels, kArgmaxRowsInCache);
  const Bands bands(map);
  for_each_task(bands.count, call.threads, [&](int64_t band) { return argmax_band(call, map, bands, band); });
}

}  // namespace

void upsample_argmax(const UpsampleArgmax& call) {
  return call.input.dtype == DType::kFloat64 ? argmax<double>(call) : argmax<float>(call);
}

}  // namespace FASTSEG_ISA
}  // namespace fastseg

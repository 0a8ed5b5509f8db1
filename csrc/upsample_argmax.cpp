// upsample_argmax's kernel: an output row at a time, its pixels' logits never leave the registers.
#include "upsample_argmax.h"

#include "upsampled_argmax.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

// confidence[x] = 1 / sum(exp(logit - largest)), the softmax value of the largest logit. `logits` is a cell's.
template <class T>
void confidence_row(const UpsampledMap<T>& map, const T* row, T* logits, T* confidence) {
  const IntVec<T> last = LastVector<T>(map.classes).vector();
  T largest[kMaxCell];
  for (int64_t i = 0; i < map.cell_count; ++i) {
    const Cell& cell = map.cells[i];
    upsample_cell(map, cell, row, logits, largest);
    for (int k = 0; k < cell.count; ++k) {
      Vec<T> sum = {};
      for (int64_t c = 0; c < map.pixel; c += kLanes<T>) {
        Vec<T> exponential = exp_of_nonpositive<T>(load(logits + k * map.pixel + c) - largest[k]);
        if (c + kLanes<T> == map.pixel) exponential = select_or_zero<T>(last, exponential);
        sum += exponential;
      }
      confidence[cell.begin + k] = 1 / sum_of<T>(sum);
    }
  }
}

template <class I>
void store_labels(const I* labels, int64_t count, const Tensor& target, int64_t first) {
  const auto to = [&](auto* typed) {
    for (int64_t x = 0; x < count; ++x) typed[first + x] = static_cast<decltype(+*typed)>(labels[x]);
  };
  if (target.dtype == DType::kUInt8) to(static_cast<uint8_t*>(target.data));
  if (target.dtype == DType::kInt16) to(static_cast<int16_t*>(target.data));
  if (target.dtype == DType::kInt32) to(static_cast<int32_t*>(target.data));
  if (target.dtype == DType::kInt64) to(static_cast<int64_t*>(target.data));
}

template <class T>
bool argmax_band(const UpsampleArgmax& call, const UpsampledMap<T>& map, const Bands& bands, int64_t band) {
  const auto padded = Pieces<T>::padded;
  const int64_t elements =
      padded(SourceRows<T>::elements(map)) + padded(kMaxCell * map.pixel) + 2 * padded(map.output_width);
  void* const memory = scratch(elements * static_cast<int64_t>(sizeof(T)));
  if (memory == nullptr) return false;
  Pieces<T> pieces(memory);
  const int64_t image = band / bands.per_image, begin = band % bands.per_image * bands.rows;
  SourceRows<T> source(map, call.input, image, pieces.take(SourceRows<T>::elements(map)));
  T* const logits = pieces.take(kMaxCell * map.pixel);
  T* const confidence = pieces.take(map.output_width);
  Int<T>* const labels = reinterpret_cast<Int<T>*>(pieces.take(map.output_width));
  for (int64_t y = begin; y < least(begin + bands.rows, map.output_height); ++y) {
    const T* const row = source.at_output(y);
    const int64_t first = (image * map.output_height + y) * map.output_width;
    argmax_row(map, row, labels);
    store_labels(labels, map.output_width, call.labels, first);
    if (call.confidence.size[0] == 0) continue;
    confidence_row(map, row, logits, confidence);
    unpack(confidence, 0, 1, map.output_width, at_mutable(call.confidence, first), call.confidence.dtype, 0, 1);
  }
  return true;
}

template <class T>
void argmax(const UpsampleArgmax& call) {
  const int64_t output_height = call.labels.size[1], output_width = call.labels.size[2];
  const Bands bands(call.input.size[0], output_height);
  const Workspace tables(UpsampledMap<T>::table_bytes(output_height, output_width));
  const UpsampledMap<T> map(call.grid, call.input, output_height, output_width, tables.data());
  for_each_task(bands.count, call.threads, [&](int64_t band) { return argmax_band(call, map, bands, band); });
}

}  // namespace

void upsample_argmax(const UpsampleArgmax& call) {
  return call.input.dtype == DType::kFloat64 ? argmax<double>(call) : argmax<float>(call);
}

}  // namespace FASTSEG_ISA
}  // namespace fastseg

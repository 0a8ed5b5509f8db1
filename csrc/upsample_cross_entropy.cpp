// upsample_cross_entropy's forward kernel. An output row at a time: the logits of a few neighbouring pixels, class
// vector by class vector, their largest, and the sum of exponentials, all in the first-level cache; then the row's
// losses. What leaves the cache are the two statistics of each pixel.
#include "upsample_cross_entropy.h"

#include "cross_entropy_terms.h"
#include "upsampled_rows.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

constexpr int64_t kRowMultiple = 32;  // whole vectors, on every instruction set
constexpr int kOverlapSums = 3;

// A band's scratch memory. Arrays over the row's pixels, but for source, logits, shift and predicted.
template <class T>
struct Scratch {
  T *source, *logits;         // input rows; logits of a cell, then their exponentials
  T *shift, *predicted;       // [pixel]: ClassTerms::shift, then zeros; and a row's sum of probabilities
  T *largest, *sum, *spread;  // of each pixel; sum is log(sum) in the end
  T *loss, *weight;
  Int<T>* labels;
  T* terms;

  static constexpr int kRowArrays = 6;

  static int64_t elements(const UpsampledMap<T>& map) {
    const auto padded = Pieces<T>::padded;
    return padded(SourceRows<T>::elements(map)) + padded(kMaxCell * map.pixel) + 2 * padded(map.pixel) +
           kRowArrays * padded(round_up(map.output_width, kRowMultiple)) + padded(ClassTerms<T>::elements(map.classes));
  }

  Scratch(const UpsampledMap<T>& map, void* memory) {
    Pieces<T> pieces(memory);
    const int64_t width = round_up(map.output_width, kRowMultiple);
    source = pieces.take(SourceRows<T>::elements(map));
    logits = pieces.take(kMaxCell * map.pixel);
    shift = pieces.take(map.pixel);
    predicted = pieces.take(map.pixel);
    T** const arrays[] = {&largest, &sum, &spread, &loss, &weight};
    for (T** array : arrays) *array = pieces.take(width);
    labels = reinterpret_cast<Int<T>*>(pieces.take(width));
    terms = pieces.take(ClassTerms<T>::elements(map.classes));
  }
};

// The sum of exp(logit - largest); logits become those exponentials. In spread sum(shift * (logit - largest)).
template <class T, bool kSmoothed>
FASTSEG_INLINE T exponentiate(T* logits, int64_t pixel, T largest, IntVec<T> last, const T* shift, T* spread) {
  Vec<T> sum = {}, spread_sum = {};
  const Vec<T> base = broadcast<T>(largest);
  for (int64_t c = 0; c < pixel; c += kLanes<T>) {
    const Vec<T> difference = load(logits + c) - base;
    Vec<T> exponential = exp_of_nonpositive<T>(difference);
    if (c + kLanes<T> == pixel) exponential = select_or_zero<T>(last, exponential);
    store(logits + c, exponential);
    sum += exponential;
    if (kSmoothed) spread_sum += difference * load(shift + c);
  }
  if (kSmoothed) *spread = sum_of<T>(spread_sum);
  return sum_of<T>(sum);
}

// Adds a pixel's probabilities to the sums over its image.
template <class T>
FASTSEG_INLINE void add_overlap(const T* exponentials, int64_t pixel, T sum, int64_t label, int64_t classes,
                                T* predicted, double* overlap) {
  const T scale = T(1) / sum;
  for (int64_t c = 0; c < pixel; c += kLanes<T>)
    store(predicted + c, load(predicted + c) + load(exponentials + c) * scale);
  overlap[label] += static_cast<double>(exponentials[label] * scale);
  overlap[2 * classes + label] += 1;
}

template <class T, bool kSmoothed>
void reduce_row(const UpsampledMap<T>& map, const Scratch<T>& s, const T* row, IntVec<T> last, double* overlap) {
  if (overlap != nullptr) memset(s.predicted, 0, map.pixel * sizeof(T));
  for (int64_t i = 0; i < map.cell_count; ++i) {
    const Cell& cell = map.cells[i];
    upsample_cell(map, cell, row, s.logits, s.largest + cell.begin);
    for (int k = 0; k < cell.count; ++k) {
      const int64_t x = cell.begin + k;
      T* const logits = s.logits + k * map.pixel;
      const int64_t label = s.labels[x];
      s.loss[x] = s.largest[x] - logits[label == kIgnored ? 0 : label];
      s.sum[x] = exponentiate<T, kSmoothed>(logits, map.pixel, s.largest[x], last, s.shift, s.spread + x);
      if (overlap != nullptr && label != kIgnored)
        add_overlap(logits, map.pixel, s.sum[x], label, map.classes, s.predicted, overlap);
    }
  }
  if (overlap == nullptr) return;
  for (int64_t c = 0; c < map.classes; ++c) overlap[map.classes + c] += static_cast<double>(s.predicted[c]);
}

// The row's losses and weights from what reduce_row left.
template <class T, bool kSmoothed>
void finish_row(const UpsampledMap<T>& map, const Scratch<T>& s, const ClassTerms<T>& terms) {
  for (int64_t x = 0; x < map.output_width; x += kLanes<T>) store(s.sum + x, log_of_positive<T>(load(s.sum + x)));
  for (int64_t x = 0; x < map.output_width; ++x) s.weight[x] = s.labels[x] == kIgnored ? 0 : terms.weight[s.labels[x]];
  for (int64_t x = 0; x < map.output_width; ++x) {
    T loss = (s.loss[x] + s.sum[x]) * s.weight[x];
    if (kSmoothed) loss = loss * (1 - terms.smoothing) + (s.sum[x] * terms.shift_sum - s.spread[x]);
    s.loss[x] = s.labels[x] == kIgnored ? 0 : loss;
  }
}

// What the tasks share.
template <class T>
struct Shared {
  const UpsampledMap<T>& map;
  const Bands& bands;
  Partial* partials;  // [bands]
  double* overlaps;   // [bands][3][classes], or null
};

template <class T, bool kSmoothed>
bool forward_band(const UpsampleCrossEntropyForward& call, const Shared<T>& shared, int64_t band) {
  const UpsampledMap<T>& map = shared.map;
  void* const memory = scratch(Scratch<T>::elements(map) * static_cast<int64_t>(sizeof(T)));
  if (memory == nullptr) return false;
  const Scratch<T> s(map, memory);
  const ClassTerms<T> terms(call, s.terms);
  memset(s.shift, 0, map.pixel * sizeof(T));
  memcpy(s.shift, terms.shift, map.classes * sizeof(T));
  const IntVec<T> last = LastVector<T>(map.classes).vector();
  const int64_t image = band / shared.bands.per_image, begin = band % shared.bands.per_image * shared.bands.rows;
  double* const overlap = shared.overlaps == nullptr ? nullptr : shared.overlaps + band * kOverlapSums * map.classes;
  Partial* const partial = &shared.partials[band];
  SourceRows<T> source(map, call.input, image, s.source);
  const int64_t width = map.output_width, pixels = call.input.size[0] * map.output_height * width;
  for (int64_t y = begin; y < least(begin + shared.bands.rows, map.output_height); ++y) {
    const int64_t labels = image * call.target.stride[0] + y * call.target.stride[1];
    if (!read_label_run(call, labels, width, call.target.stride[2], s.labels, &partial->invalid)) return true;
    reduce_row<T, kSmoothed>(map, s, source.at_output(y), last, overlap);
    finish_row<T, kSmoothed>(map, s, terms);
    const int64_t first = (image * map.output_height + y) * width;
    T* const statistics = static_cast<T*>(call.statistics.data) + first;
    memcpy(statistics, s.largest, width * sizeof(T));
    memcpy(statistics + pixels, s.sum, width * sizeof(T));
    if (call.reduction == Reduction::kNone) memcpy(static_cast<T*>(call.loss.data) + first, s.loss, width * sizeof(T));
    partial->loss += sum_of(s.loss, width);
    partial->weight += sum_of(s.weight, width);
  }
  return true;
}

// overlap = the sum of its image's bands.
template <class T>
void store_overlap(const UpsampleCrossEntropyForward& call, const Shared<T>& shared) {
  const int64_t images = call.input.size[0], classes = shared.map.classes;
  T* const target = static_cast<T*>(call.overlap.data);
  for (int64_t image = 0; image < images; ++image)
    for (int64_t i = 0; i < kOverlapSums * classes; ++i) {
      double sum = 0;
      for (int64_t band = image * shared.bands.per_image; band < (image + 1) * shared.bands.per_image; ++band)
        sum += shared.overlaps[band * kOverlapSums * classes + i];
      target[(i / classes * images + image) * classes + i % classes] = static_cast<T>(sum);
    }
}

template <class T, bool kSmoothed>
void forward(const UpsampleCrossEntropyForward& call) {
  const int64_t output_height = call.target.size[1], output_width = call.target.size[2];
  const Bands bands(call.input.size[0], output_height);
  const Workspace tables(UpsampledMap<T>::table_bytes(output_height, output_width));
  const UpsampledMap<T> map(call.grid, call.input, output_height, output_width, tables.data());
  const bool with_overlap = call.overlap.size[0] > 0;
  const int64_t partial_bytes = bands.count * static_cast<int64_t>(sizeof(Partial));
  const int64_t overlap_bytes = with_overlap ? bands.count * kOverlapSums * map.classes * 8 : 0;
  const Workspace sums(partial_bytes + overlap_bytes);
  memset(sums.data(), 0, partial_bytes + overlap_bytes);
  Partial* const partials = static_cast<Partial*>(sums.data());
  double* const overlaps = with_overlap ? reinterpret_cast<double*>(partials + bands.count) : nullptr;
  const Shared<T> shared = {map, bands, partials, overlaps};
  for_each_task(bands.count, call.threads,
                [&](int64_t band) { return forward_band<T, kSmoothed>(call, shared, band); });
  store_totals<T>(call, partials, bands.count, kSmoothed);
  if (with_overlap) store_overlap(call, shared);
}

}  // namespace

void upsample_cross_entropy_forward(const UpsampleCrossEntropyForward& call) {
  const bool wide = call.input.dtype == DType::kFloat64;
  if (call.label_smoothing > 0) return wide ? forward<double, true>(call) : forward<float, true>(call);
  return wide ? forward<double, false>(call) : forward<float, false>(call);
}

}  // namespace FASTSEG_ISA
}  // namespace fastseg

// upsample_threshold's kernel: an output row at a time, compared in registers and stored as bytes.
#include "simd/vector_math-inl.h"
#include "upsampling/output_bands-inl.h"
#include "upsampling/predictions.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

constexpr int kThresholdRowsInCache = 2;  // a tile's two expanded input rows

// Lane by lane, what a band has met of a mask: sums, and the first and the last column and row.
template <class T>
struct MaskLanes {
  Vec<T> probability;
  IntVec<T> count, left, top, right, bottom;
};

// The same of all lanes.
struct MaskSums {
  double probability;
  int64_t count, left, top, right, bottom;
};

constexpr int32_t kNowhere = 0x7fffffff;  // farther than any position

template <class T>
MaskSums sum_lanes(const MaskLanes<T>& lanes) {
  MaskSums sums = {0, 0, kNowhere, kNowhere, -1, -1};
  for (int i = 0; i < kLanes<T>; ++i) {
    sums.probability += static_cast<double>(lanes.probability[i]);
    sums.count += lanes.count[i];
    sums.left = min_of(sums.left, lanes.left[i]);
    sums.top = min_of(sums.top, lanes.top[i]);
    sums.right = max_of(sums.right, lanes.right[i]);
    sums.bottom = max_of(sums.bottom, lanes.bottom[i]);
  }
  return sums;
}

// Vectors whose masks are stored together: whole scratch rows on every machine.
template <class T>
constexpr int kTogether = kPixelMultiple / kLanes<T>;
typedef uint8_t Bytes __attribute__((vector_size(kPixelMultiple)));

// A byte, 0 or 1, of each lane.
template <class T>
FASTSEG_INLINE Bytes bytes_of(const IntVec<T> (&inside)[kTogether<T>]) {
  Bytes bytes;
#if defined(__AVX512BW__)
  uint32_t bits = 0;
  for (int i = 0; i < kTogether<T>; ++i) {
    const __m512i lanes = (__m512i)inside[i];
    bits |=
        static_cast<uint32_t>(sizeof(T) == sizeof(float) ? _mm512_movepi32_mask(lanes) : _mm512_movepi64_mask(lanes))
        << (i * kLanes<T>);
  }
  bytes = (Bytes)_mm256_maskz_set1_epi8(bits, 1);
#else
  typedef uint8_t Some __attribute__((vector_size(kLanes<T>)));
  Some some[kTogether<T>];
  for (int i = 0; i < kTogether<T>; ++i) some[i] = __builtin_convertvector(inside[i] & 1, Some);
  memcpy(&bytes, some, sizeof bytes);
#endif
  return bytes;
}

FASTSEG_INLINE bool any(Bytes bytes) {
  uint64_t words[sizeof bytes / 8];
  memcpy(words, &bytes, sizeof bytes);
  return (words[0] | words[1] | words[2] | words[3]) != 0;
}

// masks [classes][stride] = whether a logit is above the bound, for a tile's columns [0, count). kSums: whether `lanes`
// [classes] are told, too; `column` and `row` say where the tile's first one lies.
template <class T, bool kSums, class Row>
FASTSEG_NOINLINE void threshold_row(const Row logits, int64_t classes, int64_t count, T bound, uint8_t* masks,
                                    int64_t stride, MaskLanes<T>* lanes, int64_t column, int64_t row) {
  IntVec<T> places;
  for (int i = 0; i < kLanes<T>; ++i) places[i] = i;
  const IntVec<T> rows = IntVec<T>{} + static_cast<Int<T>>(row);
  for (int64_t c = 0; c < classes; ++c, masks += stride) {
    Vec<T> probability = {};
    IntVec<T> met = {};
    for (int64_t x = 0; x < count; x += kPixelMultiple) {
      IntVec<T> inside[kTogether<T>];
      for (int i = 0; i < kTogether<T>; ++i) {
        inside[i] = logits(c, x + i * kLanes<T>) > bound;
        if (kSums) inside[i] &= places < static_cast<Int<T>>(count - x - i * kLanes<T>);
      }
      const Bytes bytes = bytes_of<T>(inside);
      if (count - x >= kPixelMultiple)
        memcpy(masks + x, &bytes, sizeof bytes);
      else
        memcpy(masks + x, &bytes, count - x);
      if (!kSums || !any(bytes)) continue;
      for (int i = 0; i < kTogether<T>; ++i) {
        met |= inside[i];
        probability += select_or_zero<T>(inside[i], sigmoid_of<T>(logits(c, x + i * kLanes<T>)));
        lanes[c].count -= inside[i];
        const IntVec<T> columns = places + static_cast<Int<T>>(column + x + i * kLanes<T>);
        lanes[c].left = inside[i] & (columns < lanes[c].left) ? columns : lanes[c].left;
        lanes[c].right = inside[i] & (columns > lanes[c].right) ? columns : lanes[c].right;
      }
    }
    if (!kSums) continue;
    lanes[c].probability += probability;
    lanes[c].top = met & (rows < lanes[c].top) ? rows : lanes[c].top;
    lanes[c].bottom = met & (rows > lanes[c].bottom) ? rows : lanes[c].bottom;
  }
}

template <class T>
bool threshold_band(const UpsampleThreshold& call, const UpsampledMap<T>& map, const Bands& bands, int64_t band,
                    MaskSums* sums) {
  const int64_t of_rows = Pieces<T>::padded(ExpandedRows<T>::elements(map)) * static_cast<int64_t>(sizeof(T));
  void* const memory = scratch(of_rows + map.classes * static_cast<int64_t>(sizeof(MaskLanes<T>)));
  if (memory == nullptr) return false;
  ExpandedRows<T> source(map, call.input, false, static_cast<T*>(memory));
  MaskLanes<T>* const lanes = reinterpret_cast<MaskLanes<T>*>(static_cast<char*>(memory) + of_rows);
  const IntVec<T> nowhere = IntVec<T>{} + kNowhere, none = IntVec<T>{} - 1;
  if (sums != nullptr)
    for (int64_t c = 0; c < map.classes; ++c) lanes[c] = {Vec<T>{}, IntVec<T>{}, nowhere, nowhere, none, none};
  uint8_t* const masks = static_cast<uint8_t*>(call.masks.data);
  const T bound = static_cast<T>(call.bound);
  for_each_tile_row(map, bands, band, &source,
                    [&](int64_t image, int64_t y, const RowPair<T>& pair, int64_t begin, int64_t count) {
                      const int64_t stride = map.output_height * map.output_width;
                      uint8_t* const to = masks + image * map.classes * stride + y * map.output_width + begin;
                      with_upsampled_row(map, pair, 0, [&](const auto row) {
                        if (sums == nullptr)
                          threshold_row<T, false>(row, map.classes, count, bound, to, stride, nullptr, begin, y);
                        else
                          threshold_row<T, true>(row, map.classes, count, bound, to, stride, lanes, begin, y);
                      });
                      return true;
                    });
  if (sums != nullptr)
    for (int64_t c = 0; c < map.classes; ++c) sums[c] = sum_lanes(lanes[c]);
  return true;
}

// Scores and boxes of all masks, from the sums [bands][classes].
template <class T>
void store_scores(const UpsampleThreshold& call, const Bands& bands, const MaskSums* sums) {
  const int64_t images = call.input.size[0], classes = call.input.size[1];
  int64_t* box = static_cast<int64_t*>(call.boxes.data);
  for (int64_t mask = 0; mask < images * classes; ++mask, box += 4) {
    MaskSums all = {0, 0, kNowhere, kNowhere, -1, -1};
    for (int64_t band = 0; band < bands.per_plane; ++band) {
      const MaskSums& part = sums[(mask / classes * bands.per_plane + band) * classes + mask % classes];
      all = {all.probability + part.probability, all.count + part.count,        min_of(all.left, part.left),
             min_of(all.top, part.top),          max_of(all.right, part.right), max_of(all.bottom, part.bottom)};
    }
    const T score = static_cast<T>(all.count > 0 ? all.probability / static_cast<double>(all.count) : 0);
    unpack(&score, 0, 1, 1, at_mutable(call.scores, mask), call.scores.dtype, 0, 1);
    const int64_t corners[4] = {all.count > 0 ? all.left : 0, all.count > 0 ? all.top : 0, all.right + 1,
                                all.bottom + 1};
    memcpy(box, corners, sizeof corners);
  }
}

template <class T>
void threshold(const UpsampleThreshold& call) {
  const UpsampledMap<T> map(call.grid, call.input, call.masks, kThresholdRowsInCache);
  const Bands bands(map);
  const bool with_scores = static_cast<bool>(call.scores);
  const Workspace of_bands(with_scores ? bands.count * map.classes * static_cast<int64_t>(sizeof(MaskSums)) : 1);
  MaskSums* const sums = with_scores ? static_cast<MaskSums*>(of_bands.data()) : nullptr;
  for_each_task(bands.count, call.threads, [&](int64_t band) {
    return threshold_band(call, map, bands, band, with_scores ? sums + band * map.classes : nullptr);
  });
  if (with_scores) store_scores<T>(call, bands, sums);
}

}  // namespace

void upsample_threshold(const UpsampleThreshold& call) {
  return call.input.dtype == DType::kFloat64 ? threshold<double>(call) : threshold<float>(call);
}

}  // namespace FASTSEG_ISA
}  // namespace fastseg

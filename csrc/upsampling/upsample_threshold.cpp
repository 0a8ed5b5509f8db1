// upsample_threshold's kernel: an output row at a time, compared in registers and stored as bytes.
#include "upsampling/upsample_threshold.h"

#include "simd/vector_math-inl.h"
#include "upsampling/upsampled_rows-inl.h"

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

// masks[x] = whether logit x of a class is above the bound, for a tile's columns [0, count). kSums: whether `lanes` is
// told, too; `column` and `row` say where the tile's first one lies.
template <class T, bool kSums, class Row>
FASTSEG_NOINLINE void threshold_row(const Row logits, int64_t c, int64_t count, T bound, uint8_t* masks,
                                    MaskLanes<T>* lanes, int64_t column, int64_t row) {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes<T>)));
  IntVec<T> places;
  for (int i = 0; i < kLanes<T>; ++i) places[i] = i;
  Vec<T> probability = {};
  IntVec<T> met = {};
  const auto store_masks = [&](int64_t x, IntVec<T> counted, int64_t bytes_left) __attribute__((always_inline)) {
    const Vec<T> logit = logits(c, x);
    const IntVec<T> inside = (logit > bound) & counted;
    const Bytes bytes = __builtin_convertvector(inside & 1, Bytes);
    memcpy(masks + x, &bytes, bytes_left);
    if (!kSums) return;
    uint64_t words[2] = {};
    memcpy(words, &bytes, sizeof bytes);
    if ((words[0] | words[1]) == 0) return;
    met |= inside;
    probability += select_or_zero<T>(inside, Sigmoid<T>(logit).value);
    lanes->count -= inside;
    const IntVec<T> columns = places + static_cast<Int<T>>(column + x);
    lanes->left = inside & (columns < lanes->left) ? columns : lanes->left;
    lanes->right = inside & (columns > lanes->right) ? columns : lanes->right;
  };
  const int64_t whole = count - count % kLanes<T>;
#pragma GCC unroll 4
  for (int64_t x = 0; x < whole; x += kLanes<T>) store_masks(x, IntVec<T>{} - 1, sizeof(Bytes));
  if (whole < count) store_masks(whole, places < static_cast<Int<T>>(count - whole), count - whole);
  if (!kSums) return;
  lanes->probability += probability;
  const IntVec<T> rows = IntVec<T>{} + static_cast<Int<T>>(row);
  lanes->top = met & (rows < lanes->top) ? rows : lanes->top;
  lanes->bottom = met & (rows > lanes->bottom) ? rows : lanes->bottom;
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
  for_each_tile_row(
      map, bands, band, &source, [&](int64_t image, int64_t y, const RowPair<T>& pair, int64_t begin, int64_t count) {
        with_upsampled_row(map, pair, 0, [&](const auto row) {
          for (int64_t c = 0; c < map.classes; ++c) {
            uint8_t* const to = masks + ((image * map.classes + c) * map.output_height + y) * map.output_width + begin;
            if (sums == nullptr)
              threshold_row<T, false>(row, c, count, bound, to, nullptr, begin, y);
            else
              threshold_row<T, true>(row, c, count, bound, to, &lanes[c], begin, y);
          }
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

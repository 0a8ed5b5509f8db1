// upsample_mask_argmax's kernel: of a few columns of an output row the masks of all queries, then their sums for a few
// classes at a time, in registers, of which the largest remain.
#include "simd/vector_math-inl.h"
#include "upsampling/argmax_rows-inl.h"
#include "upsampling/predictions.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

// The sums of so many classes and vectors of columns fill the registers: 32 of AVX-512, else 16.
constexpr int64_t kClasses = FASTSEG_VECTOR_BYTES == 64 ? 10 : 5;
constexpr int kVectors = 2;
template <class T>
constexpr int64_t kColumns = kVectors * kLanes<T>;

// masks [queries][kColumns] = sigmoid of the logits from column x on.
template <class T, class Row>
FASTSEG_NOINLINE void make_masks(const Row logits, int64_t queries, int64_t x, T* masks) {
  for (int64_t q = 0; q < queries; ++q, masks += kColumns<T>)
    for (int i = 0; i < kVectors; ++i) store(masks + i * kLanes<T>, sigmoid_of<T>(logits(q, x + i * kLanes<T>)));
}

// labels[0 .. kColumns) = the first class of the largest sum, or of the first NaN. weights: [class / kClasses][queries]
// [kClasses].
template <class T>
FASTSEG_NOINLINE void argmax_of_sums(const T* masks, const T* weights, int64_t queries, int64_t classes,
                                     Int<T>* labels) {
  Vec<T> best[kVectors];
  IntVec<T> label[kVectors] = {};
  for (int64_t first = 0; first < classes; first += kClasses) {
    Vec<T> sums[kClasses][kVectors] = {};
    for (int64_t q = 0; q < queries; ++q, weights += kClasses) {
      Vec<T> mask[kVectors];
      for (int i = 0; i < kVectors; ++i) mask[i] = load(masks + q * kColumns<T> + i * kLanes<T>);
#pragma GCC unroll 10
      for (int c = 0; c < kClasses; ++c)
        for (int i = 0; i < kVectors; ++i) sums[c][i] += weights[c] * mask[i];
    }
#pragma GCC unroll 10
    for (int c = 0; c < kClasses; ++c) {
      if (first + c == classes) break;
      for (int i = 0; i < kVectors; ++i) {
        // Neither smaller nor equal is NaN, too; once it is held, nothing replaces it.
        const IntVec<T> better = first + c == 0 ? IntVec<T>{} - 1 : ~(sums[c][i] <= best[i]) & (best[i] == best[i]);
        best[i] = better ? sums[c][i] : best[i];
        label[i] = better ? IntVec<T>{} + static_cast<Int<T>>(first + c) : label[i];
      }
    }
  }
  for (int i = 0; i < kVectors; ++i) memcpy(labels + i * kLanes<T>, &label[i], sizeof label[i]);
}

// weights [N][class / kClasses][Q][kClasses], of classes that don't exist zero.
template <class T>
void pack_weights(const Tensor& probabilities, T* weights) {
  const int64_t images = probabilities.size[0], queries = probabilities.size[1], classes = probabilities.size[2];
  memset(weights, 0, images * round_up(classes, kClasses) * queries * sizeof(T));
  for (int64_t image = 0; image < images; ++image)
    for (int64_t c = 0; c < classes; c += kClasses, weights += queries * kClasses) {
      const int64_t offset = image * probabilities.stride[0] + c * probabilities.stride[2];
      pack(at(probabilities, offset), probabilities.dtype, queries, min_of(kClasses, classes - c),
           probabilities.stride[1], probabilities.stride[2], weights, kClasses);
    }
}

template <class T>
bool argmax_band(const UpsampleMaskArgmax& call, const UpsampledMap<T>& map, const Bands& bands, int64_t band,
                 const T* weights) {
  const int64_t queries = map.classes, classes = call.class_probabilities.size[2];
  const int64_t elements = Pieces<T>::padded(queries * kColumns<T>) + Pieces<T>::padded(map.tile_columns);
  weights += band / bands.per_plane * round_up(classes, kClasses) * queries;
  return with_expanded_rows(map, call.input, false, elements, [&](ExpandedRows<T>* source, Pieces<T>* pieces) {
    T* const masks = pieces->take(queries * kColumns<T>);
    Int<T>* const labels = reinterpret_cast<Int<T>*>(pieces->take(map.tile_columns));
    for_each_tile_row(
        map, bands, band, source, [&](int64_t image, int64_t y, const RowPair<T>& pair, int64_t begin, int64_t count) {
          with_upsampled_row(map, pair, 0, [&](const auto row) {
            for (int64_t x = 0; x < count; x += kColumns<T>) {
              make_masks(row, queries, x, masks);
              argmax_of_sums(masks, weights, queries, classes, labels + x);
            }
          });
          store_labels(labels, count, call.labels, (image * map.output_height + y) * map.output_width + begin);
          return true;
        });
  });
}

template <class T>
void argmax(const UpsampleMaskArgmax& call) {
  const Tensor& probabilities = call.class_probabilities;
  const UpsampledMap<T> map(call.grid, call.input, call.labels, kArgmaxRowsInCache);
  const Bands bands(map);
  const Workspace weights(map.images * round_up(probabilities.size[2], kClasses) * map.classes *
                          static_cast<int64_t>(sizeof(T)));
  pack_weights(probabilities, static_cast<T*>(weights.data()));
  for_each_task(bands.count, call.threads, [&](int64_t band) {
    return argmax_band(call, map, bands, band, static_cast<const T*>(weights.data()));
  });
}

}  // namespace

void upsample_mask_argmax(const UpsampleMaskArgmax& call) {
  return call.input.dtype == DType::kFloat64 ? argmax<double>(call) : argmax<float>(call);
}

}  // namespace FASTSEG_ISA
}  // namespace fastseg

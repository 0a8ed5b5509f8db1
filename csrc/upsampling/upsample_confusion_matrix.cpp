// upsample_confusion_matrix's kernel: an output row's predictions, counted before the next row's are made.
#include "upsampling/argmax_rows-inl.h"
#include "upsampling/predictions.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

// Every task counts in a matrix of its own: threads that shared one would wait for each other's cache lines. Counts
// don't depend on who counts, so that few tasks will do: enough to even out threads that are slower than others.
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kMatricesBytes = 64 << 20;  // of all tasks' matrices

template <class T>
bool count_band(const UpsampleConfusionMatrix& call, const UpsampledMap<T>& map, const Bands& bands, int64_t band,
                int64_t* counts, InvalidLabel* invalid) {
  const int64_t elements = 2 * Pieces<T>::padded(map.tile_columns);
  return with_expanded_rows(map, call.input, false, elements, [&](ExpandedRows<T>* source, Pieces<T>* pieces) {
    Int<T>* const labels = reinterpret_cast<Int<T>*>(pieces->take(map.tile_columns));
    Int<T>* const predictions = reinterpret_cast<Int<T>*>(pieces->take(map.tile_columns));
    for_each_tile_row(
        map, bands, band, source, [&](int64_t plane, int64_t y, const RowPair<T>& pair, int64_t begin, int64_t count) {
          const Tensor& target = call.target;
          const int64_t offset = map.offset_of(target, plane, y, begin), stride = target.stride[target.ndim - 1];
          if (!read_label_run(call, offset, count, stride, labels, invalid)) return false;
          with_upsampled_row(map, pair, 0, [&](const auto row) { argmax_row(map, pair, row, count, predictions); });
          for (int64_t x = 0; x < count; ++x)
            if (labels[x] != kIgnored) ++counts[labels[x] * map.classes + predictions[x]];
          return true;
        });
  });
}

template <class T>
void confusion_matrix(const UpsampleConfusionMatrix& call) {
  const UpsampledMap<T> map(call.grid, call.input, call.target, kArgmaxRowsInCache);
  const Bands bands(map);
  const int64_t cells = map.classes * map.classes;
  const int64_t matrices = kMatricesBytes / (cells * static_cast<int64_t>(sizeof(int64_t)));
  const int64_t tasks = min_of(bands.count, max_of(1, min_of(kTasksPerThread * call.threads, matrices)));
  const int64_t partial_bytes = tasks * static_cast<int64_t>(sizeof(Partial));
  const int64_t count_bytes = tasks * cells * static_cast<int64_t>(sizeof(int64_t));
  const Workspace workspace(partial_bytes + count_bytes);
  memset(workspace.data(), 0, partial_bytes + count_bytes);
  Partial* const partials = static_cast<Partial*>(workspace.data());
  int64_t* const counts = reinterpret_cast<int64_t*>(partials + tasks);
  for_each_task(tasks, call.threads, [&](int64_t task) {
    for (int64_t band = task * bands.count / tasks; band < (task + 1) * bands.count / tasks; ++band)
      if (!count_band(call, map, bands, band, counts + task * cells, &partials[task].invalid)) return false;
    return true;
  });
  report_invalid(call, partials, tasks);
  int64_t* const matrix = static_cast<int64_t*>(call.matrix.data);
  memset(matrix, 0, cells * sizeof(int64_t));
  for (int64_t task = 0; task < tasks; ++task)
    for (int64_t i = 0; i < cells; ++i) matrix[i] += counts[task * cells + i];
}

}  // namespace

void upsample_confusion_matrix(const UpsampleConfusionMatrix& call) {
  return call.input.dtype == DType::kFloat64 ? confusion_matrix<double>(call) : confusion_matrix<float>(call);
}

}  // namespace FASTSEG_ISA
}  // namespace fastseg

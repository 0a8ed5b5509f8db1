// upsample_cross_entropy's backward kernel. An output row at a time, a few neighbouring pixels at a time: their logits
// again, probabilities, gradients, and what the input's four pixels around them get of those; with l the label, P the
// probabilities, g the loss's gradient, and u the gradient of P through the overlap's sums:
//   gradient = (P - [c = l]) * g * scale[l] + (P * sum(shift) - shift) * g + P * (u - sum(P * u))
// A task owns a band of input rows, and the output rows that begin there: its last input row's gradient goes on in the
// next band, so that a band's first and last row are kept, and added in the end.
#include "cross_entropy_terms.h"
#include "upsample_cross_entropy.h"
#include "upsampled_rows.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

constexpr int64_t kLeastRowsOfBand = 16;  // of the output: few bands, whose first and last rows take memory

struct InputBands {
  int64_t rows, per_image, count;
  bool share_rows;  // whether output rows lie between input rows

  InputBands(int64_t images, int64_t height, int64_t output_height, Mode mode)
      : rows(
            least(height, most(ceil_div(images * height, kBands), ceil_div(kLeastRowsOfBand * height, output_height)))),
        per_image(ceil_div(height, rows)),
        count(images * per_image),
        share_rows(mode == Mode::kBilinear && height != output_height) {}
};

// A band's scratch memory.
template <class T>
struct Scratch {
  T *source, *gradient;                 // input rows; the gradients of two input rows
  T* values;                            // a cell's probabilities, then its gradients: [kMaxCell][pixel]
  T *shift, *predicted, *intersection;  // [pixel]: ClassTerms::shift and the gradients of overlap's sums, then zeros
  T *largest, *log_sum, *grad, *label_grad;  // of the row's pixels
  Int<T>* labels;
  T* terms;

  static constexpr int kRowArrays = 5;

  static int64_t elements(const UpsampledMap<T>& map) {
    const auto padded = Pieces<T>::padded;
    return padded(SourceRows<T>::elements(map)) + padded(2 * map.row) + padded(kMaxCell * map.pixel) +
           3 * padded(map.pixel) + kRowArrays * padded(map.output_width) + padded(ClassTerms<T>::elements(map.classes));
  }

  Scratch(const UpsampledMap<T>& map, void* memory) {
    Pieces<T> pieces(memory);
    source = pieces.take(SourceRows<T>::elements(map));
    gradient = pieces.take(2 * map.row);
    values = pieces.take(kMaxCell * map.pixel);
    T** const classes[] = {&shift, &predicted, &intersection};
    for (T** array : classes) *array = pieces.take(map.pixel);
    T** const pixels[] = {&largest, &log_sum, &grad, &label_grad};
    for (T** array : pixels) *array = pieces.take(map.output_width);
    labels = reinterpret_cast<Int<T>*>(pieces.take(map.output_width));
    terms = pieces.take(ClassTerms<T>::elements(map.classes));
  }
};

// What the tasks share.
template <class T>
struct Shared {
  const UpsampledMap<T>& map;
  const InputBands& bands;
  InvalidLabel* invalid;  // [bands]
  T* edges;               // [bands][2][row]: the gradients of each band's first row, and of the one after its last

  T* edge(int64_t band, int64_t which) const { return edges + (2 * band + which) * map.row; }
};

// ---- rows ----

// The labels, statistics and incoming gradients of an output row.
template <class T>
bool read_row(const UpsampleCrossEntropyBackward& call, const UpsampledMap<T>& map, const Scratch<T>& s,
              const ClassTerms<T>& terms, int64_t image, int64_t y, InvalidLabel* invalid) {
  const int64_t width = map.output_width, pixels = call.input.size[0] * map.output_height * width;
  const Tensor &target = call.target, &grad = call.grad_output;
  if (!read_label_run(call, image * target.stride[0] + y * target.stride[1], width, target.stride[2], s.labels,
                      invalid))
    return false;
  const T* const statistics = static_cast<const T*>(call.statistics.data) + (image * map.output_height + y) * width;
  memcpy(s.largest, statistics, width * sizeof(T));
  memcpy(s.log_sum, statistics + pixels, width * sizeof(T));
  if (call.reduction == Reduction::kNone) {
    pack(at(grad, image * grad.stride[0] + y * grad.stride[1]), grad.dtype, 1, width, 0, grad.stride[2], s.grad, 0);
  } else {
    const T reduced = grad_of_reduced<T>(call);
    for (int64_t x = 0; x < width; ++x) s.grad[x] = reduced;
  }
  for (int64_t x = 0; x < width; ++x) {
    const bool ignored = s.labels[x] == kIgnored;
    s.grad[x] = ignored ? 0 : s.grad[x];
    s.label_grad[x] = ignored ? 0 : terms.scale[s.labels[x]] * s.grad[x];
  }
  return true;
}

template <class T>
FASTSEG_INLINE void probabilities_of(const UpsampledMap<T>& map, const Scratch<T>& s, const Cell& cell, int k,
                                     const T* row, T* values) {
  const int64_t x = cell.begin + k;
  const T *left = row + cell.left, *right = row + cell.right;
  const Vec<T> left_weight = broadcast<T>(map.left_weight[x]), right_weight = broadcast<T>(map.right_weight[x]);
  const Vec<T> largest = broadcast<T>(s.largest[x]), log_sum = broadcast<T>(s.log_sum[x]);
  for (int64_t c = 0; c < map.pixel; c += kLanes<T>) {
    const Vec<T> logit = load(left + c) * left_weight + load(right + c) * right_weight;
    store(values + c, exp_of_nonpositive<T>((logit - largest) - log_sum));
  }
}

// values = the gradient of a pixel's logits, from its probabilities. The label's share, the smoothing's and the
// overlap's are differences of their own, the first two of which vanish exactly where the probability is 1.
template <class T>
FASTSEG_INLINE void differentiate(const UpsampledMap<T>& map, const Scratch<T>& s, const ClassTerms<T>& terms,
                                  int64_t x, bool with_overlap, T* values) {
  const Int<T> label = s.labels[x];
  const T of_label = label == kIgnored ? T(0) : values[label];
  const T counted = with_overlap && label != kIgnored ? T(1) : T(0);
  T mean = 0;  // sum(P * u)
  if (counted != 0) {
    Vec<T> sum = {};
    for (int64_t c = 0; c < map.pixel; c += kLanes<T>) sum += load(values + c) * load(s.predicted + c);
    mean = sum_of<T>(sum) + of_label * s.intersection[label];
  }
  const T label_grad = s.label_grad[x], grad = s.grad[x];
  for (int64_t c = 0; c < map.pixel; c += kLanes<T>) {
    const Vec<T> p = load(values + c);
    Vec<T> gradient = p * label_grad + (p * terms.shift_sum - load(s.shift + c)) * grad;
    if (counted != 0) gradient += p * (load(s.predicted + c) - mean);
    store(values + c, gradient);
  }
  if (label == kIgnored) return;
  const T u = s.predicted[label] + s.intersection[label];
  values[label] = (of_label - 1) * label_grad + (of_label * terms.shift_sum - terms.shift[label]) * grad +
                  counted * (of_label * (u - mean));
}

// Adds to the input's pixels what a cell's gradients, times `scale`, give them: upper and lower are the gradients of
// the output row's two input rows, which may be one.
template <class T, int Count>
FASTSEG_INLINE void add_cell(const UpsampledMap<T>& map, const Cell& cell, const Position<T>& position, const T* values,
                             const T* scale, T* upper, T* lower) {
  Vec<T> left_weight[Count], right_weight[Count];
  for (int k = 0; k < Count; ++k) {
    left_weight[k] = broadcast<T>(map.left_weight[cell.begin + k] * scale[k]);
    right_weight[k] = broadcast<T>(map.right_weight[cell.begin + k] * scale[k]);
  }
  const Vec<T> upper_weight = broadcast<T>(position.first_weight), lower_weight = broadcast<T>(position.second_weight);
  for (int64_t c = 0; c < map.pixel; c += kLanes<T>) {
    Vec<T> left = {}, right = {};
    for (int k = 0; k < Count; ++k) {
      const Vec<T> value = load(values + k * map.pixel + c);
      left += value * left_weight[k];
      right += value * right_weight[k];
    }
    const auto add = [&](T* sum, Vec<T> value) { store(sum, load(sum) + value); };
    add(upper + cell.left + c, left * upper_weight);
    add(lower + cell.left + c, left * lower_weight);
    add(upper + cell.right + c, right * upper_weight);
    add(lower + cell.right + c, right * lower_weight);
  }
}

template <class T>
void add_cell(const UpsampledMap<T>& map, const Cell& cell, const Position<T>& position, const T* values,
              const T* scale, T* upper, T* lower) {
  switch (cell.count) {
    case 1:
      return add_cell<T, 1>(map, cell, position, values, scale, upper, lower);
    case 2:
      return add_cell<T, 2>(map, cell, position, values, scale, upper, lower);
    case 3:
      return add_cell<T, 3>(map, cell, position, values, scale, upper, lower);
    default:
      return add_cell<T, kMaxCell>(map, cell, position, values, scale, upper, lower);
  }
}

// kLabelsAlone: neither smoothing nor overlap, so that a pixel's gradient is P - [c = l] times one number.
template <class T, bool kLabelsAlone>
void differentiate_row(const UpsampledMap<T>& map, const Scratch<T>& s, const ClassTerms<T>& terms, const T* row,
                       const Position<T>& position, bool with_overlap) {
  constexpr T kOnes[kMaxCell] = {1, 1, 1, 1};
  T* const upper = s.gradient + position.first % 2 * map.row;
  T* const lower = s.gradient + position.second % 2 * map.row;
  for (int64_t i = 0; i < map.cell_count; ++i) {
    const Cell& cell = map.cells[i];
    for (int k = 0; k < cell.count; ++k) {
      T* const values = s.values + k * map.pixel;
      probabilities_of(map, s, cell, k, row, values);
      const Int<T> label = s.labels[cell.begin + k];
      if (!kLabelsAlone)
        differentiate(map, s, terms, cell.begin + k, with_overlap, values);
      else if (label != kIgnored)
        values[label] -= 1;
    }
    add_cell(map, cell, position, s.values, kLabelsAlone ? s.label_grad + cell.begin : kOnes, upper, lower);
  }
}

// ---- bands ----

template <class T>
void store_row(const UpsampleCrossEntropyBackward& call, const UpsampledMap<T>& map, int64_t image, int64_t y,
               const T* row) {
  const Tensor& gradient = call.grad_input;
  unpack(row, map.pixel, map.width, map.classes,
         at_mutable(gradient, image * gradient.stride[0] + y * gradient.stride[2]), gradient.dtype, gradient.stride[3],
         gradient.stride[1]);
}

// The gradients of the overlap's sums of an image.
template <class T>
void read_overlap(const UpsampleCrossEntropyBackward& call, int64_t image, int64_t pixel, const Scratch<T>& s) {
  const Tensor& grad = call.grad_overlap;
  for (int sum = 0; sum < 2; ++sum) {
    T* const target = sum == 0 ? s.intersection : s.predicted;
    memset(target, 0, pixel * sizeof(T));
    if (grad.size[0] > 0)
      pack(at(grad, sum * grad.stride[0] + image * grad.stride[1]), grad.dtype, 1, grad.size[2], 0, grad.stride[2],
           target, 0);
  }
}

// The first output row that is made of input row y or a later one.
template <class T>
int64_t first_output_row(const UpsampledMap<T>& map, int64_t y) {
  int64_t low = 0, high = map.output_height;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (map.rows[middle].first < y)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

template <class T, bool kLabelsAlone>
bool backward_band(const UpsampleCrossEntropyBackward& call, const Shared<T>& shared, int64_t band) {
  const UpsampledMap<T>& map = shared.map;
  void* const memory = scratch(Scratch<T>::elements(map) * static_cast<int64_t>(sizeof(T)));
  if (memory == nullptr) return false;
  const Scratch<T> s(map, memory);
  const ClassTerms<T> terms(call, s.terms);
  memset(s.shift, 0, map.pixel * sizeof(T));
  memcpy(s.shift, terms.shift, map.classes * sizeof(T));
  const int64_t image = band / shared.bands.per_image, begin = band % shared.bands.per_image * shared.bands.rows;
  const int64_t end = least(begin + shared.bands.rows, map.height);
  read_overlap(call, image, map.pixel, s);
  memset(s.gradient, 0, 2 * map.row * sizeof(T));
  SourceRows<T> source(map, call.input, image, s.source);

  int64_t row = begin;  // of the input; its gradient and the next row's are being summed
  const auto finish = [&] {
    T* const gradient = s.gradient + row % 2 * map.row;
    const bool first = row == begin && begin > 0, last = row == end;
    if (shared.bands.share_rows && (first || last))
      memcpy(shared.edge(band, last ? 1 : 0), gradient, map.row * sizeof(T));
    else
      store_row(call, map, image, row, gradient);
    memset(gradient, 0, map.row * sizeof(T));
    ++row;
  };
  const int64_t last_output = first_output_row(map, end);
  for (int64_t y = first_output_row(map, begin); y < last_output; ++y) {
    if (!read_row(call, map, s, terms, image, y, &shared.invalid[band])) return true;
    while (row < map.rows[y].first) finish();
    differentiate_row<T, kLabelsAlone>(map, s, terms, source.at_output(y), map.rows[y], call.grad_overlap.size[0] > 0);
  }
  while (row < end) finish();
  if (shared.bands.share_rows && end < map.height) finish();
  return true;
}

// Adds the two gradients of the band's first row.
template <class T>
void join_band(const UpsampleCrossEntropyBackward& call, const Shared<T>& shared, int64_t band) {
  const int64_t image = band / shared.bands.per_image, begin = band % shared.bands.per_image * shared.bands.rows;
  if (begin == 0) return;
  T* const own = shared.edge(band, 0);
  const T* const other = shared.edge(band - 1, 1);
  for (int64_t i = 0; i < shared.map.row; ++i) own[i] += other[i];
  store_row(call, shared.map, image, begin, own);
}

template <class T, bool kLabelsAlone>
void backward(const UpsampleCrossEntropyBackward& call) {
  const int64_t output_height = call.target.size[1], output_width = call.target.size[2];
  const InputBands bands(call.input.size[0], call.input.size[2], output_height, call.grid.mode);
  const Workspace tables(UpsampledMap<T>::table_bytes(output_height, output_width));
  const UpsampledMap<T> map(call.grid, call.input, output_height, output_width, tables.data());
  const int64_t invalid_bytes = round_up(bands.count * static_cast<int64_t>(sizeof(InvalidLabel)), 64);
  const int64_t edge_bytes = bands.share_rows ? bands.count * 2 * map.row * static_cast<int64_t>(sizeof(T)) : 0;
  const Workspace workspace(invalid_bytes + edge_bytes);
  memset(workspace.data(), 0, invalid_bytes);
  InvalidLabel* const invalid = static_cast<InvalidLabel*>(workspace.data());
  T* const edges = reinterpret_cast<T*>(static_cast<char*>(workspace.data()) + invalid_bytes);
  const Shared<T> shared = {map, bands, invalid, edges};
  for_each_task(bands.count, call.threads,
                [&](int64_t band) { return backward_band<T, kLabelsAlone>(call, shared, band); });
  *call.invalid = {};
  for (int64_t band = 0; band < bands.count; ++band) keep_first(invalid[band], call.invalid);
  if (!bands.share_rows || call.invalid->found) return;
  for_each_task(bands.count, call.threads, [&](int64_t band) {
    join_band(call, shared, band);
    return true;
  });
}

}  // namespace

void upsample_cross_entropy_backward(const UpsampleCrossEntropyBackward& call) {
  const bool wide = call.input.dtype == DType::kFloat64;
  if (call.label_smoothing > 0 || call.grad_overlap.size[0] > 0)
    return wide ? backward<double, false>(call) : backward<float, false>(call);
  return wide ? backward<double, true>(call) : backward<float, true>(call);
}

}  // namespace FASTSEG_ISA
}  // namespace fastseg

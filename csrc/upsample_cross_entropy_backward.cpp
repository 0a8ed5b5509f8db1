// upsample_cross_entropy's backward kernel: a block of an output row's pixels is upsampled again, and cross_entropy's
// loop makes its gradient in place. The transposed upsampling follows in two steps: an output row is added to the
// gradients of its two expanded input rows, and these are contracted to the input's columns once all output rows have
// been added.
//
// A task owns a band of input rows, and the output rows that begin there. The row after its last one gets a gradient
// too, so that bands keep their first row's and that row's gradient, and those are added in the end.
#include "upsample_cross_entropy.h"
#include "upsample_cross_entropy_tiles.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

constexpr int kRowsInCache = 4;  // a tile's two expanded input rows, and their gradients

// Classes whose gradients lie side by side: four rows of columns are turned into columns of four classes, which are
// then summed at once.
constexpr int kGroup = 4;

struct InputBands {
  int64_t rows, per_image, count;
  bool share_rows;  // whether output rows lie between input rows

  InputBands(int64_t images, int64_t height, int64_t output_height, Mode mode)
      : rows(least(height, most(ceil_div(images * height, kBands), ceil_div(kLeastBandRows * height, output_height)))),
        per_image(ceil_div(height, rows)),
        count(images * per_image),
        share_rows(mode == Mode::kBilinear && height != output_height) {}
};

// What the tasks share.
template <class T>
struct Shared {
  const UpsampledMap<T>& map;
  const InputBands& bands;
  InvalidLabel* invalid;  // [bands]
  T* edges;               // [bands][2]: the gradients of each band's first row, and of the one after its last

  // Of the gradient of an input row: [groups of classes][width][kGroup].
  int64_t row_elements() const { return ceil_div(map.classes, kGroup) * map.width * kGroup; }
  T* edge(int64_t band, int which) const { return edges + (2 * band + which) * row_elements(); }
};

// A band's scratch memory.
template <class T>
struct Scratch {
  T *source, *tile, *terms;
  T* expanded;                 // the gradients of the tile's two expanded input rows
  T* gradient;                 // those of the band's rows, and of the one after the last
  T *predicted, *intersected;  // [classes]: the gradients of overlap's sums

  static int64_t elements(const Shared<T>& shared) {
    const UpsampledMap<T>& map = shared.map;
    const int64_t pieces[] = {ExpandedRows<T>::elements(map),
                              Tile<T>::elements(map.classes, map.row_stride, false),
                              ClassTerms<T>::elements(map.classes),
                              2 * map.row_elements(),
                              (shared.bands.rows + 1) * shared.row_elements(),
                              map.classes,
                              map.classes};
    int64_t sum = 0;
    for (int64_t piece : pieces) sum += Pieces<T>::padded(piece);
    return sum;
  }

  Scratch(const Shared<T>& shared, Pieces<T> pieces) {
    const UpsampledMap<T>& map = shared.map;
    source = pieces.take(ExpandedRows<T>::elements(map));
    tile = pieces.take(Tile<T>::elements(map.classes, map.row_stride, false));
    terms = pieces.take(ClassTerms<T>::elements(map.classes));
    expanded = pieces.take(2 * map.row_elements());
    gradient = pieces.take((shared.bands.rows + 1) * shared.row_elements());
    predicted = pieces.take(map.classes);
    intersected = pieces.take(map.classes);
  }
};

// ---- pixels ----

// The statistics and incoming gradients of an output row's columns [x, x + count).
template <class T>
void read_grad(const UpsampleCrossEntropyBackward& call, const UpsampledMap<T>& map, int64_t image, int64_t y,
               int64_t x, int64_t count, const Tile<T>& tile) {
  const int64_t first = (image * map.output_height + y) * map.output_width + x;
  const T* const statistics = static_cast<const T*>(call.statistics.data) + first;
  memcpy(tile.largest, statistics, count * sizeof(T));
  memcpy(tile.log_sum, statistics + map.images * map.output_height * map.output_width, count * sizeof(T));
  const Tensor& grad = call.grad_output;
  if (call.reduction == Reduction::kNone) {
    const int64_t offset = image * grad.stride[0] + y * grad.stride[1] + x * grad.stride[2];
    pack(at(grad, offset), grad.dtype, 1, count, 0, grad.stride[2], tile.grad, 0);
  } else {
    const T reduced = grad_of_reduced<T>(call);
    for (int64_t p = 0; p < count; ++p) tile.grad[p] = reduced;
  }
}

// u, the gradient of a vector of class c's probabilities through the overlap's sums.
template <class T>
FASTSEG_INLINE Vec<T> grad_of_probabilities(const Tile<T>& tile, const Scratch<T>& s, int64_t c, int64_t p) {
  IntVec<T> labels;
  memcpy(&labels, tile.labels + p, sizeof labels);
  return s.predicted[c] + select_or_zero<T>(labels == static_cast<Int<T>>(c), broadcast<T>(s.intersected[c]));
}

// In the tile's logits the probabilities P of the pixels, and in spread sum(P * u); zero where a pixel is ignored.
template <class T, class Row>
void weigh_overlap(const Tile<T>& tile, const Scratch<T>& s, const Row logits, int64_t count) {
  for (int64_t p = 0; p < count; p += kLanes<T>) {
    IntVec<T> labels;
    memcpy(&labels, tile.labels + p, sizeof labels);
    const Vec<T> largest = load(tile.largest + p), log_sum = load(tile.log_sum + p);
    Vec<T> spread = {};
    for (int64_t c = 0; c < tile.classes; ++c) {
      Vec<T> probability = exp_of_nonpositive<T>((logits(c, p) - largest) - log_sum);
      probability = select_or_zero<T>(labels != kIgnored, probability);
      store(tile.logits + c * tile.stride + p, probability);
      spread += probability * grad_of_probabilities(tile, s, c, p);
    }
    store(tile.spread + p, spread);
  }
}

// ---- the transposed upsampling ----

// Where an output row's gradients go to: those of its two expanded input rows, which may be one.
template <class T>
class GradientsToRows {
 public:
  GradientsToRows(const UpsampledMap<T>& map, const Position<T>& position, T* expanded)
      : first_(expanded + position.first % 2 * map.row_elements()),
        second_(expanded + position.second % 2 * map.row_elements()),
        class_stride_(map.row_stride),
        first_weight_(broadcast<T>(position.first_weight)),
        second_weight_(broadcast<T>(position.second_weight)) {}

  FASTSEG_INLINE void operator()(int64_t c, int64_t x, Vec<T> gradient) const {
    T *const first = first_ + c * class_stride_ + x, *const second = second_ + c * class_stride_ + x;
    store(first, load(first) + gradient * first_weight_);
    store(second, load(second) + gradient * second_weight_);
  }

 private:
  T *first_, *second_;
  int64_t class_stride_;
  Vec<T> first_weight_, second_weight_;
};

// Adds a group's gradients of expanded columns [x, end), which have the same left column, to its left and right
// column's.
template <class T>
FASTSEG_INLINE void add_columns(const UpsampledMap<T>& map, Int<T> column, typename Quad<T>::type left,
                                typename Quad<T>::type right, T* gradient) {
  using Classes = typename Quad<T>::type;
  const auto add = [&](int64_t to, Classes value) {
    Classes sum;
    memcpy(&sum, gradient + to * kGroup, sizeof sum);
    sum += value;
    memcpy(gradient + to * kGroup, &sum, sizeof sum);
  };
  add(column, left);
  if (!map.columns.blends) return;
  const bool same = map.width == map.output_width || column + 1 == map.width;
  add(same ? column : column + 1, right);
}

// Adds an expanded row's gradient, of the tile's columns [begin, begin + count), to the input row's.
template <class T>
void contract(const UpsampledMap<T>& map, const T* expanded, int64_t begin, int64_t count, T* gradient) {
  using Classes = typename Quad<T>::type;
  const Int<T>* const left = map.columns.left + begin;
  const T *left_weight = map.columns.left_weight + begin, *right_weight = map.columns.right_weight + begin;
  for (int64_t c = 0; c < map.classes; c += kGroup, gradient += map.width * kGroup) {
    Classes left_sum = {}, right_sum = {};
    Int<T> column = left[0];
    for (int64_t x = 0; x < count; x += kGroup) {
      Classes quad[kGroup];
      for (int i = 0; i < kGroup; ++i)  // beyond the last class, that one again
        memcpy(&quad[i], expanded + least(c + i, map.classes - 1) * map.row_stride + x, sizeof quad[i]);
      transpose4<T>(quad);
      for (int i = 0; i < kGroup && x + i < count; ++i) {
        if (left[x + i] != column) {
          add_columns(map, column, left_sum, right_sum, gradient);
          left_sum = right_sum = Classes{};
          column = left[x + i];
        }
        left_sum += quad[i] * left_weight[x + i];
        right_sum += quad[i] * right_weight[x + i];
      }
    }
    add_columns(map, column, left_sum, right_sum, gradient);
  }
}

// ---- bands ----

// The gradients of the overlap's sums of an image.
template <class T>
void read_overlap(const UpsampleCrossEntropyBackward& call, int64_t image, const Scratch<T>& s) {
  const Tensor& grad = call.grad_overlap;
  T* const targets[2] = {s.intersected, s.predicted};
  for (int sum = 0; sum < 2; ++sum)
    pack(at(grad, sum * grad.stride[0] + image * grad.stride[1]), grad.dtype, 1, grad.size[2], 0, grad.stride[2],
         targets[sum], 0);
}

template <class T>
void store_row(const UpsampleCrossEntropyBackward& call, const Shared<T>& shared, int64_t image, int64_t y,
               const T* row) {
  const Tensor& gradient = call.grad_input;
  const int64_t classes = shared.map.classes, width = shared.map.width;
  for (int64_t c = 0; c < classes; c += kGroup)
    unpack(row + c * width, kGroup, width, least(kGroup, classes - c),
           at_mutable(gradient, image * gradient.stride[0] + c * gradient.stride[1] + y * gradient.stride[2]),
           gradient.dtype, gradient.stride[3], gradient.stride[1]);
}

// The first output row that is made of input row y and later ones.
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

// A band and one of its tiles.
struct Place {
  int64_t band, image, begin, end;  // begin, end: of the band's input rows
  int64_t column, columns;          // of the output
};

template <class T, Kind kKind>
bool backward_tile(const UpsampleCrossEntropyBackward& call, const Shared<T>& shared, const Scratch<T>& s,
                   const ClassTerms<T>& terms, const Place& place, ExpandedRows<T>* source) {
  const UpsampledMap<T>& map = shared.map;
  const bool with_overlap = call.grad_overlap.size[0] > 0;
  const Tile<T> tile(map.classes, map.row_stride, false, s.tile);
  const Rows<const T> no_target = {nullptr, 0};
  source->select(place.image, place.column, place.columns);
  memset(s.expanded, 0, 2 * map.row_elements() * sizeof(T));
  int64_t row = place.begin;  // of the input: its gradient and the next row's are being summed
  const auto finish_row = [&] {
    T* const expanded = s.expanded + row % 2 * map.row_elements();
    contract(map, expanded, place.column, place.columns, s.gradient + (row - place.begin) * shared.row_elements());
    memset(expanded, 0, map.row_elements() * sizeof(T));
    ++row;
  };
  const int64_t count = place.columns, last = first_output_row(map, place.end);
  for (int64_t y = first_output_row(map, place.begin); y < last; ++y) {
    while (row < map.rows[y].first) finish_row();
    const RowPair<T> pair(map, source, map.rows[y]);
    if (!read_labels<T>(call, place.image, y, place.column, count, tile.labels, &shared.invalid[place.band]))
      return false;
    read_grad(call, map, place.image, y, place.column, count, tile);
    weigh_pixels<T, kKind>(tile, terms, no_target, count);
    const GradientsToRows<T> keep(map, map.rows[y], s.expanded);
    with_upsampled_row(map, pair, 0, [&](const auto logits) {
      if (!with_overlap) return differentiate<T, kKind>(tile, terms, logits, no_target, count, keep);
      weigh_overlap(tile, s, logits, count);
      differentiate<T, kKind>(tile, terms, logits, no_target, count, [&](int64_t c, int64_t p, Vec<T> gradient) {
        const Vec<T> u = grad_of_probabilities(tile, s, c, p) - load(tile.spread + p);
        keep(c, p, gradient + load(tile.logits + c * tile.stride + p) * u);
      });
    });
  }
  while (row < place.end) finish_row();
  if (shared.bands.share_rows && place.end < map.height) finish_row();
  return true;
}

template <class T, Kind kKind>
bool backward_band(const UpsampleCrossEntropyBackward& call, const Shared<T>& shared, int64_t band) {
  const UpsampledMap<T>& map = shared.map;
  const bool with_overlap = call.grad_overlap.size[0] > 0;
  void* const memory = scratch(Scratch<T>::elements(shared) * static_cast<int64_t>(sizeof(T)));
  if (memory == nullptr) return false;
  const Scratch<T> s(shared, Pieces<T>(memory));
  const ClassTerms<T> terms(call, s.terms);
  ExpandedRows<T> source(map, call.input, s.source);
  Place place = {band, band / shared.bands.per_image, band % shared.bands.per_image * shared.bands.rows, 0, 0, 0};
  place.end = least(place.begin + shared.bands.rows, map.height);
  if (with_overlap) read_overlap(call, place.image, s);
  memset(s.gradient, 0, (shared.bands.rows + 1) * shared.row_elements() * sizeof(T));
  for (; place.column < map.output_width; place.column += map.tile_columns) {
    place.columns = least(map.tile_columns, map.output_width - place.column);
    if (!backward_tile<T, kKind>(call, shared, s, terms, place, &source)) return true;
  }
  const bool shares_first = shared.bands.share_rows && place.begin > 0;
  const int64_t row_bytes = shared.row_elements() * static_cast<int64_t>(sizeof(T));
  if (shares_first) memcpy(shared.edge(band, 0), s.gradient, row_bytes);
  for (int64_t y = place.begin + shares_first; y < place.end; ++y)
    store_row(call, shared, place.image, y, s.gradient + (y - place.begin) * shared.row_elements());
  if (shared.bands.share_rows && place.end < map.height)
    memcpy(shared.edge(band, 1), s.gradient + (place.end - place.begin) * shared.row_elements(), row_bytes);
  return true;
}

// Adds the two gradients of the band's first row.
template <class T>
void join_band(const UpsampleCrossEntropyBackward& call, const Shared<T>& shared, int64_t band) {
  const int64_t image = band / shared.bands.per_image, begin = band % shared.bands.per_image * shared.bands.rows;
  if (begin == 0) return;
  T* const own = shared.edge(band, 0);
  const T* const other = shared.edge(band - 1, 1);
  for (int64_t i = 0; i < shared.row_elements(); ++i) own[i] += other[i];
  store_row(call, shared, image, begin, own);
}

template <class T, Kind kKind>
void backward(const UpsampleCrossEntropyBackward& call) {
  const int64_t output_height = call.target.size[1], output_width = call.target.size[2];
  const InputBands bands(call.input.size[0], call.input.size[2], output_height, call.grid.mode);
  const Workspace tables(UpsampledMap<T>::table_bytes(output_height, output_width));
  const UpsampledMap<T> map(call.grid, call.input, output_height, output_width, kRowsInCache, tables.data());
  Shared<T> shared = {map, bands, nullptr, nullptr};
  const int64_t invalid_bytes = round_up(bands.count * static_cast<int64_t>(sizeof(InvalidLabel)), 64);
  const int64_t edge_elements = bands.share_rows ? bands.count * 2 * shared.row_elements() : 0;
  const Workspace workspace(invalid_bytes + edge_elements * static_cast<int64_t>(sizeof(T)));
  memset(workspace.data(), 0, invalid_bytes);
  shared.invalid = static_cast<InvalidLabel*>(workspace.data());
  shared.edges = reinterpret_cast<T*>(static_cast<char*>(workspace.data()) + invalid_bytes);
  for_each_task(bands.count, call.threads, [&](int64_t band) { return backward_band<T, kKind>(call, shared, band); });
  *call.invalid = {};
  for (int64_t band = 0; band < bands.count; ++band) keep_first(shared.invalid[band], call.invalid);
  if (!bands.share_rows || call.invalid->found) return;
  for_each_task(bands.count, call.threads, [&](int64_t band) {
    join_band(call, shared, band);
    return true;
  });
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

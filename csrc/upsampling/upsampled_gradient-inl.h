// The transposed upsampling: gradients of an output row's pixels, summed to the input's. It has two steps: an output
// row is added to the gradients of its two expanded input rows, and these are contracted to the input's columns once
// all output rows have been added.
//
// A task owns a band of input rows, and the output rows that begin there. The row after its last one gets a gradient
// too, so that bands keep their first row's and that row's gradient, and those are added in the end. Of a volume it has
// the band in every plane: the gradient of an output plane's band goes to those of the two input planes that are
// blended to it.
#pragma once

#include "upsampling/output_bands-inl.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

constexpr int kGradientRowsInCache = 4;  // a tile's two expanded input rows, and their gradients

// Classes whose gradients lie side by side: their rows are turned, four columns at a time, into columns of so many
// classes, which are then summed at once.
template <class T>
constexpr int kGroup = FASTSEG_VECTOR_BYTES > 16 && sizeof(T) == sizeof(float) ? 8 : 4;
template <class T>
struct ClassGroup {
  typedef T type __attribute__((vector_size(kGroup<T> * sizeof(T))));
};

struct InputBands {
  int64_t rows, per_image, count;
  bool share_rows;  // whether output rows lie between input rows

  template <class T>
  explicit InputBands(const UpsampledMap<T>& map)
      : rows(min_of(map.height, max_of(ceil_div(map.images * map.height, kBands),
                                       ceil_div(least_rows(map) * map.height, map.output_height)))),
        per_image(ceil_div(map.height, rows)),
        count(map.images * per_image),
        share_rows(map.grid.mode == Mode::kLinear && map.height != map.output_height) {}

 private:
  // A volume's bands may be narrower: there is more to do in each than to expand rows.
  template <class T>
  static int64_t least_rows(const UpsampledMap<T>& map) {
    return map.is_volume ? kLeastBandRows / 2 : kLeastBandRows;
  }
};

// The gradient that a call makes, and what its tasks share.
template <class T>
struct GradientSum {
  const UpsampledMap<T>& map;
  const InputBands& bands;
  const Tensor& gradient;  // of the input's shape, any strides
  T* edges;                // [bands][depth][2]: the gradients of each band's first row, and of the one after its last

  // Of the gradient of an input row: [groups of classes][width][kGroup<T>].
  int64_t row_elements() const { return ceil_div(map.classes, kGroup<T>) * map.width * kGroup<T>; }
  T* edge(int64_t band, int64_t z, int which) const {
    return edges + ((band * map.depth + z) * 2 + which) * row_elements();
  }
  int64_t edge_elements() const { return bands.share_rows ? bands.count * map.depth * 2 * row_elements() : 0; }
  int64_t band_elements() const { return (bands.rows + 1) * row_elements(); }
};

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

// Adds an expanded row's gradient, of the tile's columns [begin, begin + count) and of those that fill them up, which
// have none, to the input row's.
template <class T>
FASTSEG_NOINLINE void contract(const UpsampledMap<T>& map, const T* expanded, int64_t begin, int64_t count,
                               T* gradient) {
  using Classes = typename ClassGroup<T>::type;
  constexpr int kColumns = 4;
  const Columns<T>& columns = map.columns;
  const Int<T>* const left = columns.left + begin;
  const T *left_weight = columns.left_weight + begin, *right_weight = columns.right_weight + begin;
  const Int<T> to_right = columns.blends && map.width != map.output_width;  // 0: a column counts alone
  const Int<T> last = static_cast<Int<T>>(map.width - 1);                   // which has none to its right
  for (int64_t c = 0; c < map.classes; c += kGroup<T>, gradient += map.width * kGroup<T>) {
    const T* rows[kGroup<T>];
    for (int i = 0; i < kGroup<T>; ++i) rows[i] = expanded + min_of(c + i, map.classes - 1) * map.row_stride;
    // The sums for a pair of input columns stay in registers until the next pair comes, which mostly begins where this
    // one ends.
    Classes left_sum = {}, right_sum = {};
    Int<T> column = left[0];
    const auto add = [&](Int<T> to, Classes value) {
      T* const target = gradient + min_of(to, last) * kGroup<T>;
      Classes sum;
      memcpy(&sum, target, sizeof sum);
      sum += value;
      memcpy(target, &sum, sizeof sum);
    };
    for (int64_t x = 0; x < count; x += kColumns) {
      Classes at_column[kColumns];
      for (int i = 0; i < kColumns; ++i) {  // of rows of eight columns, which padding leaves room for
        Classes of_rows[2];
        memcpy(&of_rows[0], rows[i] + x, sizeof of_rows[0]);
        memcpy(&of_rows[1], rows[i + kGroup<T> - kColumns] + x, sizeof of_rows[1]);
        at_column[i] = first_fours(of_rows[0], of_rows[1]);
      }
      transpose4(at_column);
      for (int i = 0; i < kColumns; ++i) {
        const Int<T> next = left[x + i];
        if (next != column) {
          add(column, left_sum);
          if (next != column + to_right) {
            add(column + to_right, right_sum);
            right_sum = Classes{};
          }
          left_sum = right_sum;
          right_sum = Classes{};
          column = next;
        }
        left_sum += at_column[i] * left_weight[x + i];
        right_sum += at_column[i] * right_weight[x + i];
      }
    }
    add(column, left_sum);
    add(column + to_right, right_sum);
  }
}

template <class T>
void store_row(const GradientSum<T>& sum, int64_t image, int64_t z, int64_t y, const T* row) {
  const Tensor& gradient = sum.gradient;
  const int64_t classes = sum.map.classes, width = sum.map.width;
  const int64_t first = sum.map.input_offset(gradient, image, z, y);
  for (int64_t c = 0; c < classes; c += kGroup<T>)
    unpack(row + c * width, kGroup<T>, width, min_of(kGroup<T>, classes - c),
           at_mutable(gradient, first + c * gradient.stride[1]), gradient.dtype, gradient.stride[gradient.ndim - 1],
           gradient.stride[1]);
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

// A band, and one of its tiles.
struct Place {
  int64_t band, image, begin, end;  // begin, end: of the band's input rows
  int64_t plane, column, columns;   // of the output; planes of all images
};

// Sums the gradients of a tile's columns over the band's output rows into rows, [input rows of the band + 1].
template <class T, class Work>
bool sum_tile(const GradientSum<T>& sum, const Place& place, ExpandedRows<T>* source, Work* work, T* expanded,
              T* rows) {
  const UpsampledMap<T>& map = sum.map;
  source->select(place.plane, place.column, place.columns);
  memset(expanded, 0, 2 * map.row_elements() * sizeof(T));
  int64_t row = place.begin;  // of the input: its gradient and the next row's are being summed
  const auto finish_row = [&] {
    T* const done = expanded + row % 2 * map.row_elements();
    contract(map, done, place.column, place.columns, rows + (row - place.begin) * sum.row_elements());
    memset(done, 0, map.row_elements() * sizeof(T));
    ++row;
  };
  const int64_t last = first_output_row(map, place.end);
  for (int64_t y = first_output_row(map, place.begin); y < last; ++y) {
    while (row < map.rows[y].first) finish_row();
    const RowPair<T> pair(map, source, map.rows[y]);
    if (!work->row(place, y, pair, GradientsToRows<T>(map, map.rows[y], expanded))) return false;
  }
  while (row < place.end) finish_row();
  if (sum.bands.share_rows && place.end < map.height) finish_row();
  return true;
}

// Stores the sums of a band's rows in an input plane, and clears them.
template <class T>
void store_plane(const GradientSum<T>& sum, const Place& place, int64_t z, T* rows) {
  const bool shares_first = sum.bands.share_rows && place.begin > 0,
             shares_last = sum.bands.share_rows && place.end < sum.map.height;
  const int64_t row_bytes = sum.row_elements() * static_cast<int64_t>(sizeof(T));
  if (shares_first) memcpy(sum.edge(place.band, z, 0), rows, row_bytes);
  for (int64_t y = place.begin + shares_first; y < place.end; ++y)
    store_row(sum, place.image, z, y, rows + (y - place.begin) * sum.row_elements());
  if (shares_last) memcpy(sum.edge(place.band, z, 1), rows + (place.end - place.begin) * sum.row_elements(), row_bytes);
  memset(rows, 0, sum.band_elements() * sizeof(T));
}

// Adds the sums of a band's rows in an output plane to those of the two input planes that are blended to it, and clears
// them. of_planes: [2] of sums, of even and of odd planes.
template <class T>
void spread_plane(const GradientSum<T>& sum, const Position<T>& planes, T* rows, T* of_planes) {
  const int64_t elements = sum.band_elements();
  T* const first = of_planes + planes.first % 2 * elements;
  T* const second = of_planes + planes.second % 2 * elements;
  for (int64_t i = 0; i < elements; ++i) first[i] += rows[i] * planes.first_weight;
  for (int64_t i = 0; i < elements; ++i) second[i] += rows[i] * planes.second_weight;
  memset(rows, 0, elements * sizeof(T));
}

// Work: what is done to an output row. Its static elements(map) is the scratch memory that it takes from pieces, and
// kRelative whether it takes logits relative to their pixels' largest.
template <class T, class Work, class Call>
bool sum_band(const GradientSum<T>& sum, const Call& call, Partial* partial, int64_t band) {
  const UpsampledMap<T>& map = sum.map;
  const int64_t band_elements = sum.band_elements(), sums = map.blends_planes ? 3 : 1;
  const int64_t elements =
      Pieces<T>::padded(2 * map.row_elements()) + Pieces<T>::padded(sums * band_elements) + Work::elements(map);
  const auto sum_rows = [&](ExpandedRows<T>* source, Pieces<T>* pieces) {
    T* const expanded = pieces->take(2 * map.row_elements());
    T* const rows = pieces->take(sums * band_elements);  // of an output plane, and where planes are blended of two
                                                         // input ones
    T* const of_planes = map.blends_planes ? rows + band_elements : rows;
    memset(rows, 0, sums * band_elements * sizeof(T));
    const int64_t image = band / sum.bands.per_image, begin = band % sum.bands.per_image * sum.bands.rows;
    Place place = {band, image, begin, min_of(begin + sum.bands.rows, map.height), 0, 0, 0};
    Work work(call, map, place, partial, pieces);
    int64_t z = 0;  // of the input: its gradient, and where planes are blended the next one's, are being summed
    const auto store_planes = [&](int64_t end) {
      for (; z < end; ++z) store_plane(sum, place, z, of_planes + (map.blends_planes ? z % 2 * band_elements : 0));
    };
    for (int64_t output = 0; output < map.output_depth; ++output) {
      store_planes(map.planes[output].first);
      place.plane = image * map.output_depth + output;
      for (place.column = 0; place.column < map.output_width; place.column += map.tile_columns) {
        place.columns = min_of(map.tile_columns, map.output_width - place.column);
        if (!sum_tile(sum, place, source, &work, expanded, rows)) return;
      }
      if (map.blends_planes) spread_plane(sum, map.planes[output], rows, of_planes);
    }
    store_planes(map.depth);
  };
  return with_expanded_rows(map, call.input, Work::kRelative, elements, sum_rows);
}

// Adds the two gradients of the band's first row.
template <class T>
void join_band(const GradientSum<T>& sum, int64_t band) {
  const int64_t image = band / sum.bands.per_image, begin = band % sum.bands.per_image * sum.bands.rows;
  if (begin == 0) return;
  for (int64_t z = 0; z < sum.map.depth; ++z) {
    T* const own = sum.edge(band, z, 0);
    const T* const other = sum.edge(band - 1, z, 1);
    for (int64_t i = 0; i < sum.row_elements(); ++i) own[i] += other[i];
    store_row(sum, image, z, begin, own);
  }
}

// Calls work for every row of every tile and sums the gradients that it keeps. Nothing is stored of a band where it
// returned false, having put an invalid label into its partial.
template <class T, class Work, class Call>
void sum_gradients(const Call& call, const UpsampledMap<T>& map, const InputBands& bands, const Tensor& gradient,
                   Partial* partials) {
  GradientSum<T> sum = {map, bands, gradient, nullptr};
  const Workspace edges(sum.edge_elements() * static_cast<int64_t>(sizeof(T)));
  sum.edges = static_cast<T*>(edges.data());
  for_each_task(bands.count, call.threads,
                [&](int64_t band) { return sum_band<T, Work>(sum, call, &partials[band], band); });
  if (!bands.share_rows) return;
  for (int64_t band = 0; band < bands.count; ++band)
    if (partials[band].invalid.found) return;
  for_each_task(bands.count, call.threads, [&](int64_t band) {
    join_band(sum, band);
    return true;
  });
}

}  // namespace
}  // namespace FASTSEG_ISA
}  // namespace fastseg

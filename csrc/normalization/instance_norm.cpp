// Instance normalisation and a leaky ReLU. Forward reads the input twice and writes once, a group of images at a time;
// backward the same with the incoming gradient beside it. The input's values are matrices: of an image's pixels, whose
// columns are channels; or of one plane, in rows of a few vectors, whose columns are all the same channel.
#include "normalization/instance_norm.h"

#include "core/cache.h"
#include "core/integers.h"
#include "core/parallel.h"
#include "simd/pack-inl.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

// Vectors of a row that are worked on together.
constexpr int kVectors = 4;
constexpr int kVectorsOfGradients = 2;  // each with five that say how it is changed

template <class T>
constexpr int64_t kLine = 64 / sizeof(T);  // a cache line's values

// `rows` rows of `columns` values, one right after the other.
struct Extent {
  int64_t rows, columns;
};

// ---- loops over a block ----

template <class L, class T>
FASTSEG_INLINE L read(const T* source) {
  L values;
  memcpy(&values, source, sizeof values);
  return values;
}

template <class L, class T>
FASTSEG_INLINE void write(T* target, L values) {
  memcpy(target, &values, sizeof values);
}

template <class L, int V>
struct Chunk {
  using Lanes = L;  // a vector, or one number
  static constexpr int kCount = V;
};

// visit(chunk, column) for chunks that cover all columns: several vectors, one, one number.
template <class T, int Several, class Visit>
FASTSEG_INLINE void for_each_chunk(int64_t columns, Visit visit) {
  int64_t column = 0;
  for (; column + Several * kLanes<T> <= columns; column += Several * kLanes<T>)
    visit(Chunk<Vec<T>, Several>{}, column);
  for (; column + kLanes<T> <= columns; column += kLanes<T>) visit(Chunk<Vec<T>, 1>{}, column);
  for (; column < columns; ++column) visit(Chunk<T, 1>{}, column);
}

template <class T>
FASTSEG_NOINLINE void add_up(const T* input, Extent extent, T* sums) {
  for_each_chunk<T, kVectors>(extent.columns, [&](auto chunk, int64_t column) {
    using L = typename decltype(chunk)::Lanes;
    constexpr int V = decltype(chunk)::kCount, kWidth = sizeof(L) / sizeof(T);
    L sum[V] = {};
    const T* source = input + column;
    for (int64_t row = 0; row < extent.rows; ++row, source += extent.columns)
      for (int v = 0; v < V; ++v) sum[v] += read<L>(source + v * kWidth);
    for (int v = 0; v < V; ++v) write(sums + column + v * kWidth, sum[v]);
  });
}

// Sums of the distances from `centre`, and of their squares.
template <class T>
FASTSEG_NOINLINE void add_up_distances(const T* input, Extent extent, const T* centre, T* distances, T* squares) {
  for_each_chunk<T, kVectors>(extent.columns, [&](auto chunk, int64_t column) {
    using L = typename decltype(chunk)::Lanes;
    constexpr int V = decltype(chunk)::kCount, kWidth = sizeof(L) / sizeof(T);
    L sum[V] = {}, square[V] = {}, middle[V];
    for (int v = 0; v < V; ++v) middle[v] = read<L>(centre + column + v * kWidth);
    const T* source = input + column;
    for (int64_t row = 0; row < extent.rows; ++row, source += extent.columns) {
      for (int v = 0; v < V; ++v) {
        const L distance = read<L>(source + v * kWidth) - middle[v];
        sum[v] += distance;
        square[v] += distance * distance;
      }
    }
    for (int v = 0; v < V; ++v) {
      write(distances + column + v * kWidth, sum[v]);
      write(squares + column + v * kWidth, square[v]);
    }
  });
}

// How a column is normalised, (x - mean) * scale + shift, and for the backward pass what is taken from its gradient.
template <class T>
struct Columns {
  T *mean, *scale, *shift;
  T *gradient_mean, *gradient_slope;
};
constexpr int kArrays = 5;

template <class T>
Columns<T> columns_at(T* memory, int64_t columns) {
  return {memory, memory + columns, memory + 2 * columns, memory + 3 * columns, memory + 4 * columns};
}

template <class T>
void fill(T* values, T value, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = value;
}

// What a plane's first column is, all are.
template <class T>
void spread(const Columns<T>& by, int64_t columns) {
  T* const arrays[kArrays] = {by.mean, by.scale, by.shift, by.gradient_mean, by.gradient_slope};
  for (T* const array : arrays) fill(array, array[0], columns);
}

template <class T>
T total(const T* values, int64_t count) {
  T sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += values[i];
  return sum;
}

// The numbers of some columns that their values are normalised by.
template <class L, int V>
struct Normal {
  L mean[V], scale[V], shift[V];

  template <class T>
  FASTSEG_INLINE Normal(const Columns<T>& by, int64_t column) {
    for (int v = 0; v < V; ++v, column += sizeof(L) / sizeof(T)) {
      mean[v] = read<L>(by.mean + column), scale[v] = read<L>(by.scale + column);
      shift[v] = read<L>(by.shift + column);
    }
  }
};

template <class T>
FASTSEG_NOINLINE void normalise(const T* input, Extent extent, const Columns<T>& by, T slope, T* output) {
  for_each_chunk<T, kVectors>(extent.columns, [&](auto chunk, int64_t column) {
    using L = typename decltype(chunk)::Lanes;
    constexpr int V = decltype(chunk)::kCount, kWidth = sizeof(L) / sizeof(T);
    const Normal<L, V> to(by, column);
    int64_t offset = column;
    for (int64_t row = 0; row < extent.rows; ++row, offset += extent.columns) {
      for (int v = 0; v < V; ++v) {
        const L value = (read<L>(input + offset + v * kWidth) - to.mean[v]) * to.scale[v] + to.shift[v];
        write(output + offset + v * kWidth, value > L{} ? value : value * slope);
      }
    }
  });
}

// What both passes of the gradient make of a value and its incoming gradient.
template <class L>
struct Term {
  L distance, gradient;  // from the mean; through the ReLU
};

template <class L, class T>
FASTSEG_INLINE Term<L> term(const T* input, const T* grad_output, L mean, L scale, L shift, T slope) {
  const L distance = read<L>(input) - mean, gradient = read<L>(grad_output);
  return {distance, distance * scale + shift > L{} ? gradient : gradient * slope};
}

// Sums of the gradient through the ReLU, and of it times the distance from the mean.
template <class T>
FASTSEG_NOINLINE void add_up_gradients(const T* input, const T* grad_output, Extent extent, const Columns<T>& by,
                                       T slope, T* sums, T* products) {
  for_each_chunk<T, kVectorsOfGradients>(extent.columns, [&](auto chunk, int64_t column) {
    using L = typename decltype(chunk)::Lanes;
    constexpr int V = decltype(chunk)::kCount, kWidth = sizeof(L) / sizeof(T);
    const Normal<L, V> to(by, column);
    L sum[V] = {}, product[V] = {};
    int64_t offset = column;
    for (int64_t row = 0; row < extent.rows; ++row, offset += extent.columns) {
      for (int v = 0; v < V; ++v) {
        const int64_t at = offset + v * kWidth;
        const Term<L> found = term(input + at, grad_output + at, to.mean[v], to.scale[v], to.shift[v], slope);
        sum[v] += found.gradient;
        product[v] += found.gradient * found.distance;
      }
    }
    for (int v = 0; v < V; ++v) {
      write(sums + column + v * kWidth, sum[v]);
      write(products + column + v * kWidth, product[v]);
    }
  });
}

template <class T>
FASTSEG_NOINLINE void differentiate(const T* input, const T* grad_output, Extent extent, const Columns<T>& by, T slope,
                                    T* grad_input) {
  for_each_chunk<T, kVectorsOfGradients>(extent.columns, [&](auto chunk, int64_t column) {
    using L = typename decltype(chunk)::Lanes;
    constexpr int V = decltype(chunk)::kCount, kWidth = sizeof(L) / sizeof(T);
    const Normal<L, V> to(by, column);
    L gradient_mean[V], gradient_slope[V];
    for (int v = 0; v < V; ++v) {
      const int64_t at = column + v * kWidth;
      gradient_mean[v] = read<L>(by.gradient_mean + at), gradient_slope[v] = read<L>(by.gradient_slope + at);
    }
    int64_t offset = column;
    for (int64_t row = 0; row < extent.rows; ++row, offset += extent.columns) {
      for (int v = 0; v < V; ++v) {
        const int64_t at = offset + v * kWidth;
        const Term<L> found = term(input + at, grad_output + at, to.mean[v], to.scale[v], to.shift[v], slope);
        write(grad_input + at, (found.gradient - gradient_mean[v] - found.distance * gradient_slope[v]) * to.scale[v]);
      }
    }
  });
}

// ---- the two passes ----

// Where the first value of a row of pixels lies in planes.
int64_t in_planes(const Tensor& pixels, int64_t offset) {
  const int64_t image = pixels.size[1] * pixels.size[2];
  return offset / image * image + offset % image / pixels.size[1];
}

template <class T>
T* elements(const Tensor& tensor) {
  return static_cast<T*>(tensor.data);
}

template <class T>
void set_column(const InstanceNorm& call, int64_t image, int64_t channel, const Columns<T>& by, int64_t column) {
  const int64_t cells = call.input.size[0] * call.input.size[1], cell = image * call.input.size[1] + channel;
  const T rstd = elements<T>(call.statistics)[cells + cell];
  by.mean[column] = elements<T>(call.statistics)[cell];
  by.scale[column] = call.weight ? elements<T>(call.weight)[channel] * rstd : rstd;
  by.shift[column] = call.bias ? elements<T>(call.bias)[channel] : 0;
}

// Of a block's columns: the mean, the squares about it and the distances from it; or two sums of the gradient.
template <class T>
struct Block {
  T *first, *second, *third;
};
constexpr int kBlockArrays = 3;

template <class T>
Block<T> block_at(T* memory, int64_t columns) {
  return {memory, memory + columns, memory + 2 * columns};
}

// The first two of them, of a plane or image up to now.
struct Sums {
  double *first, *second;
  int64_t rows = 0;
};

// What a pass does: `sum` of a block, where `one` says that its columns are one channel, whose sums come first; `add`
// of that to the sums of a plane or image; `finish` of a channel's, which sets how a column is changed; and `apply` of
// that to a block.
template <class T>
struct Forward {
  const InstanceNormForward& call;

  void prepare(int64_t, int64_t, const Columns<T>&, int64_t) const {}

  // The mean, of a rounded sum, is corrected by that of the distances from it.
  bool sum(int64_t offset, Extent extent, bool one, const Columns<T>&, const Block<T>& to) const {
    const T* const input = elements<T>(call.input) + offset;
    const int64_t columns = extent.columns;
    const T values = static_cast<T>(one ? extent.rows * columns : extent.rows);
    add_up(input, extent, to.first);
    if (one) fill(to.first, total(to.first, columns), columns);
    for (int64_t i = 0; i < columns; ++i) to.first[i] /= values;
    add_up_distances(input, extent, to.first, to.third, to.second);
    if (one) to.third[0] = total(to.third, columns), to.second[0] = total(to.second, columns);
    for (int64_t i = 0; i < (one ? 1 : columns); ++i) {
      const T correction = to.third[i] / values;
      to.first[i] += correction;
      to.second[i] -= correction * to.third[i];
    }
    return true;
  }

  // Chan, Golub and LeVeque: Updating formulae and a pairwise algorithm for computing sample variances, 1979.
  void add(Sums& all, const Block<T>& block, Extent extent) const {
    const double part = static_cast<double>(extent.rows) / static_cast<double>(all.rows + extent.rows);
    const double weight = static_cast<double>(all.rows) * part;
    for (int64_t i = 0; i < extent.columns; ++i) {
      const double distance = static_cast<double>(block.first[i]) - all.first[i];
      all.first[i] += distance * part;
      all.second[i] += static_cast<double>(block.second[i]) + distance * distance * weight;
    }
    all.rows += extent.rows;
  }

  void finish(int64_t image, int64_t channel, double mean, double squares, const Columns<T>& by, int64_t column) const {
    const int64_t cells = call.input.size[0] * call.input.size[1], cell = image * call.input.size[1] + channel;
    const double variance = squares / static_cast<double>(call.input.size[2]);
    elements<T>(call.statistics)[cell] = static_cast<T>(mean);
    elements<T>(call.statistics)[cells + cell] = static_cast<T>(1 / __builtin_sqrt(variance + call.eps));
    set_column(call, image, channel, by, column);
  }

  bool apply(int64_t offset, Extent extent, bool one, const Columns<T>& by) const {
    const T* const input = elements<T>(call.input) + offset;
    const T slope = static_cast<T>(call.negative_slope);
    if (one) return normalise(input, extent, by, slope, elements<T>(call.output) + offset), true;
    T* const block = static_cast<T*>(scratch(extent.rows * extent.columns * int64_t{sizeof(T)}));
    if (block == nullptr) return false;
    normalise(input, extent, by, slope, block);
    unpack_to(block, extent.columns, extent.rows, extent.columns,
              elements<T>(call.output) + in_planes(call.input, offset), 1, call.input.size[2]);
    return true;
  }
};

// With s the sum of a channel's incoming gradients g and p that of their products with (x - mean), the input's gradient
// is scale * (g - s / S - (x - mean) * rstd^2 * p / S), the weight's is rstd * p, and the bias's is s.
template <class T>
struct Backward {
  const InstanceNormBackward& call;

  void prepare(int64_t image, int64_t channel, const Columns<T>& by, int64_t column) const {
    set_column(call, image, channel, by, column);
  }

  bool sum(int64_t offset, Extent extent, bool one, const Columns<T>& by, const Block<T>& to) const {
    const T* const gradient = incoming(offset, extent);
    if (gradient == nullptr) return false;
    add_up_gradients(elements<T>(call.input) + offset, gradient, extent, by, static_cast<T>(call.negative_slope),
                     to.first, to.second);
    if (one) to.first[0] = total(to.first, extent.columns), to.second[0] = total(to.second, extent.columns);
    return true;
  }

  void add(Sums& all, const Block<T>& block, Extent extent) const {
    for (int64_t i = 0; i < extent.columns; ++i) {
      all.first[i] += static_cast<double>(block.first[i]);
      all.second[i] += static_cast<double>(block.second[i]);
    }
  }

  void finish(int64_t image, int64_t channel, double gradient, double product, const Columns<T>& by,
              int64_t column) const {
    const int64_t cells = call.input.size[0] * call.input.size[1], cell = image * call.input.size[1] + channel;
    const double rstd = static_cast<double>(elements<T>(call.statistics)[cells + cell]);
    const double values = static_cast<double>(call.input.size[2]);
    by.gradient_mean[column] = static_cast<T>(gradient / values);
    by.gradient_slope[column] = static_cast<T>(rstd * rstd * product / values);
    elements<T>(call.sums)[cell] = static_cast<T>(rstd * product);
    elements<T>(call.sums)[cells + cell] = static_cast<T>(gradient);
  }

  bool apply(int64_t offset, Extent extent, bool, const Columns<T>& by) const {
    const T* const gradient = incoming(offset, extent);
    if (gradient == nullptr) return false;
    differentiate(elements<T>(call.input) + offset, gradient, extent, by, static_cast<T>(call.negative_slope),
                  elements<T>(call.grad_input) + offset);
    return true;
  }

  // A block of the incoming gradient as the input lies. Null where memory ran out.
  const T* incoming(int64_t offset, Extent extent) const {
    if (call.gradient_in_pixels == call.in_pixels) return elements<T>(call.grad_output) + offset;
    T* const block = static_cast<T*>(scratch(extent.rows * extent.columns * int64_t{sizeof(T)}));
    if (block != nullptr)
      pack_from(elements<T>(call.grad_output) + in_planes(call.input, offset), extent.rows, extent.columns, 1,
                call.input.size[2], block, extent.columns);
    return block;
  }
};

// ---- the two layouts ----

// Pixels: a matrix for each image, whose columns are the channels. Blocks of its rows are tasks.
template <class T, class Pass>
void run_pixels(const InstanceNorm& call, const Pass& pass) {
  const int64_t images = call.input.size[0], channels = call.input.size[1], pixels = call.input.size[2];
  const int64_t pixel_bytes = channels * int64_t{sizeof(T)};
  const int64_t fitting = max_of(kNormPixelsBytes / pixel_bytes / kLine<T>, 1) * kLine<T>;
  const int64_t rows = min_of(fitting, pixels), blocks = ceil_div(pixels, rows);
  const int64_t group = min_of(max_of(kNormImagesBytes / (pixels * pixel_bytes), 1), images);
  const Workspace workspace(group * (kBlockArrays * blocks + kArrays) * pixel_bytes);
  T* const memory = static_cast<T*>(workspace.data());
  for (int64_t first = 0; first < images; first += group) {
    const int64_t count = min_of(group, images - first);
    const auto sums_of = [&](int64_t image, int64_t block) {
      return block_at(memory + (image * blocks + block) * kBlockArrays * channels, channels);
    };
    const auto columns_of = [&](int64_t image) {
      return columns_at(memory + (group * kBlockArrays * blocks + image * kArrays) * channels, channels);
    };
    const auto extent_of = [&](int64_t block) { return Extent{min_of(rows, pixels - block * rows), channels}; };
    const auto offset_of = [&](int64_t image, int64_t block) {
      return ((first + image) * pixels + block * rows) * channels;
    };
    for (int64_t image = 0; image < count; ++image)
      for (int64_t c = 0; c < channels; ++c) pass.prepare(first + image, c, columns_of(image), c);
    for_each_task(count * blocks, call.threads, [&](int64_t task) {
      const int64_t image = task / blocks, block = task % blocks;
      return pass.sum(offset_of(image, block), extent_of(block), false, columns_of(image), sums_of(image, block));
    });
    for_each_task(count, call.threads, [&](int64_t image) {
      double* const buffer = static_cast<double*>(scratch(2 * channels * int64_t{sizeof(double)}));
      if (buffer == nullptr) return false;
      memset(buffer, 0, static_cast<size_t>(2 * channels) * sizeof(double));
      Sums all = {buffer, buffer + channels};
      for (int64_t block = 0; block < blocks; ++block) pass.add(all, sums_of(image, block), extent_of(block));
      for (int64_t c = 0; c < channels; ++c)
        pass.finish(first + image, c, all.first[c], all.second[c], columns_of(image), c);
      return true;
    });
    for_each_task(count * blocks, call.threads, [&](int64_t task) {
      const int64_t image = task / blocks, block = task % blocks;
      return pass.apply(offset_of(image, block), extent_of(block), false, columns_of(image));
    });
  }
}

// Planes: each a matrix of rows of a few vectors, and a row that is shorter; a task each.
template <class T, class Pass>
bool run_plane(const InstanceNorm& call, const Pass& pass, int64_t plane) {
  constexpr int64_t kColumns = kVectors * kLanes<T>;
  const int64_t channels = call.input.size[1], values = call.input.size[2], begin = plane * values;
  const int64_t rows = values / kColumns, fitting = kNormPlaneBytes / (kColumns * int64_t{sizeof(T)});
  const int64_t image = plane / channels, channel = plane % channels;
  const Extent rest = {1, values % kColumns};
  T memory[kArrays * kColumns] = {}, sums[kBlockArrays * kColumns];
  const Columns<T> by = columns_at(memory, kColumns);
  const Block<T> block = block_at(sums, kColumns);
  double gathered[2] = {};
  Sums all = {gathered, gathered + 1};
  const auto for_each_block = [&](auto visit) {
    for (int64_t row = 0; row < rows; row += fitting)
      visit(begin + row * kColumns, Extent{min_of(fitting, rows - row), kColumns});
    if (rest.columns > 0) visit(begin + rows * kColumns, rest);
  };
  pass.prepare(image, channel, by, 0);
  spread(by, kColumns);
  for_each_block([&](int64_t offset, Extent extent) {
    pass.sum(offset, extent, true, by, block);
    pass.add(all, block, {extent.rows * extent.columns, 1});
  });
  pass.finish(image, channel, all.first[0], all.second[0], by, 0);
  spread(by, kColumns);
  for_each_block([&](int64_t offset, Extent extent) { pass.apply(offset, extent, true, by); });
  return true;
}

template <class T, class Pass>
void run(const InstanceNorm& call, const Pass& pass) {
  if (!call.input.data) return;
  if (call.in_pixels) return run_pixels<T>(call, pass);
  for_each_task(call.input.size[0] * call.input.size[1], call.threads,
                [&](int64_t plane) { return run_plane<T>(call, pass, plane); });
}

}  // namespace

void instance_norm_forward(const InstanceNormForward& call) {
  call.input.dtype == DType::kFloat64 ? run<double>(call, Forward<double>{call})
                                      : run<float>(call, Forward<float>{call});
}

void instance_norm_backward(const InstanceNormBackward& call) {
  call.input.dtype == DType::kFloat64 ? run<double>(call, Backward<double>{call})
                                      : run<float>(call, Backward<float>{call});
}

}  // namespace FASTSEG_ISA
}  // namespace fastseg

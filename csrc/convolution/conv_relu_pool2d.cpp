// conv_relu_pool2d, forward, the direct algorithm: a band of the input is packed, the convolution's rows are computed
// into a ring buffer that holds one pooling window's height, and pooled from there. Only pooled values are written to
// memory.
#include "convolution/conv_relu_pool2d.h"

#include "convolution/conv_tile-inl.h"
#include "convolution/pool_tile-inl.h"
#include "core/cache.h"
#include "core/parallel.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

constexpr int64_t kLargestBand = 16;  // pooled rows
static_assert(kWidestTile <= kDirectColumns, "Python counts with the widest tile of any instruction set");

template <class T>
struct Forward {
  const ConvReluPool2dForward& call;
  const ConvShape shape;
  const int64_t width;     // the convolution's columns, rounded up to whole tiles
  const int64_t packed_w;  // columns of a packed input row
  const int64_t band;      // pooled rows to a task
  const int64_t blocks;    // of channels
  T* weights = nullptr;    // [blocks][taps][block]
  T* bias = nullptr;       // [blocks][block]
  Terms terms;             // of a patch, from its first element

  explicit Forward(const ConvReluPool2dForward& c)
      : call(c),
        shape(c.input, c.weight, c.output, c.geometry),
        width(round_up(shape.convolved_w, kWidestTile)),
        packed_w(packed_width(shape, c.geometry, width)),
        band(choose_band()),
        blocks(ceil_div(shape.k, kBlock<T>)),
        terms{nullptr, shape.kernel_h * chunks_in_row(), shape.kernel_w / chunks_in_row() * shape.c} {}

  // A kernel row's taps are neighbours in a packed row, unless it is dilated.
  int64_t chunks_in_row() const { return call.geometry.dilation[1] == 1 ? 1 : shape.kernel_w; }

  int64_t band_rows(int64_t pooled_rows) const {
    const ConvPoolGeometry& g = call.geometry;
    const int64_t convolved = (pooled_rows - 1) * g.pool_stride[0] + g.pool_size[0];
    return input_rows(shape, g, {0, convolved}).size();
  }

  int64_t choose_band() const {
    const int64_t row_bytes = packed_w * shape.c * static_cast<int64_t>(sizeof(T));
    int64_t rows = 1;
    while (rows < min_of(kLargestBand, shape.pooled_h) && band_rows(rows + 1) * row_bytes <= kDirectBandBytes) ++rows;
    return rows;
  }

  int vectors(int64_t block) const { return vectors_of<T>(shape.k, block); }

  int64_t weight_elements() const { return blocks * shape.taps() * kBlock<T>; }

  void pack_weights(void* workspace) {
    weights = static_cast<T*>(workspace);
    bias = weights + weight_elements();
    int64_t* offsets = reinterpret_cast<int64_t*>(bias + blocks * kBlock<T>);
    memset(workspace, 0, static_cast<size_t>(weight_elements() + blocks * kBlock<T>) * sizeof(T));
    for (int64_t k = 0; k < shape.k; ++k) {
      const int64_t block = k / kBlock<T>, lane = k % kBlock<T>;
      pack_kernel(call.weight, shape, k, weights + block * shape.taps() * kBlock<T> + lane, vectors(block) * kLanes<T>);
      if (call.bias)
        pack(at(call.bias, k * call.bias.stride[0]), call.bias.dtype, 1, 1, 1, 1, bias + block * kBlock<T> + lane, 1);
    }
    for (int64_t chunk = 0; chunk < terms.count; ++chunk) {
      const int64_t columns = chunks_in_row();
      offsets[chunk] =
          (chunk / columns * call.geometry.dilation[0] * packed_w + chunk % columns * call.geometry.dilation[1]) *
          shape.c;
    }
    terms.chunks = offsets;
  }

  // One row of the convolution for one block of channels: [width][block].
  template <int Vectors>
  void convolve_row(const T* input, int64_t block, T* target) const {
    const int64_t step = call.geometry.stride[1] * shape.c;
    Vec<T> start[Vectors];
    for (int v = 0; v < Vectors; ++v) start[v] = load(bias + block * kBlock<T> + v * kLanes<T>);
    for (int64_t x = 0; x < width; x += kPixels<Vectors>)
      multiply_tile<T, Vectors>(input + x * step, step, terms, weights + block * shape.taps() * kBlock<T>, start,
                                target + x * Vectors * kLanes<T>);
  }

  bool run(int64_t task) const {
    const ConvPoolGeometry& g = call.geometry;
    const int64_t bands = ceil_div(shape.pooled_h, band), image = task / bands;
    const Span pooled = {task % bands * band, min_of((task % bands + 1) * band, shape.pooled_h)};
    const Span rows = input_rows(shape, g,
                                 {window_span(g, 0, pooled.begin, shape.convolved_h).begin,
                                  window_span(g, 0, pooled.end - 1, shape.convolved_h).end});
    const int64_t input_elements = rows.size() * packed_w * shape.c;
    const int64_t ring_elements = g.pool_size[0] * width * kBlock<T>, row_elements = shape.pooled_w * kBlock<T>;
    T* input = static_cast<T*>(scratch((input_elements + ring_elements + 2 * row_elements) * int64_t{sizeof(T)}));
    if (input == nullptr) return false;
    T* ring = input + input_elements;
    T* values = ring + ring_elements;
    Int<T>* positions = reinterpret_cast<Int<T>*>(values + row_elements);

    pack_input(call.input, g.padding[1], image, rows, packed_w, input);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t lanes = vectors(block) * kLanes<T>;
      int64_t next = 0;  // the first row of the convolution that isn't in the ring
      for (int64_t window = pooled.begin; window < pooled.end; ++window) {
        const Span span = window_span(g, 0, window, shape.convolved_h);
        const T* window_rows[kCut];
        for (int64_t row = span.begin; row < span.end; ++row) {
          T* target = ring + row % g.pool_size[0] * width * lanes;
          window_rows[row - span.begin] = target;
          if (row < next) continue;
          const T* source = input + (row * g.stride[0] - g.padding[0] - rows.begin) * packed_w * shape.c;
          lanes == kBlock<T> ? convolve_row<2>(source, block, target) : convolve_row<1>(source, block, target);
        }
        next = span.end;
        pool_row(window_rows, span, window, shape.convolved_w, g, shape.pooled_w, lanes, values, positions);
        unpack_pooled(values, positions, lanes, image, block * kBlock<T>, min_of(lanes, shape.k - block * kBlock<T>),
                      window, call.output, call.positions);
      }
    }
    return true;
  }
};

template <class T>
void forward(const ConvReluPool2dForward& call) {
  Forward<T> kernel(call);
  if (kernel.shape.n * kernel.shape.k * kernel.shape.pooled_h * kernel.shape.pooled_w == 0) return;
  const int64_t elements = kernel.weight_elements() + kernel.blocks * kBlock<T>;
  Workspace workspace(elements * int64_t{sizeof(T)} + kernel.terms.count * int64_t{sizeof(int64_t)});
  kernel.pack_weights(workspace.data());
  for_each_task(kernel.shape.n * ceil_div(kernel.shape.pooled_h, kernel.band), call.threads,
                [&](int64_t task) { return kernel.run(task); });
}

}  // namespace

void conv_relu_pool2d_forward(const ConvReluPool2dForward& call) {
  call.input.dtype == DType::kFloat64 ? forward<double>(call) : forward<float>(call);
}

}  // namespace FASTSEG_ISA
}  // namespace fastseg

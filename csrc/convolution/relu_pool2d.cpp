// conv_relu_pool2d by a library: what follows (and, backwards, precedes) a library's convolution. Forward is ReLU,
// pooling and positions in one pass; backward writes the dense gradient of the convolution's output in one pass.
#include "convolution/conv_relu_pool2d.h"
#include "convolution/pool_tile-inl.h"
#include "core/cache.h"
#include "core/parallel.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

inline int64_t row_offset(const Tensor& tensor, int64_t image, int64_t channel, int64_t row) {
  return image * tensor.stride[0] + channel * tensor.stride[1] + row * tensor.stride[2];
}

// A block of channels of one row of [N, K, H, W], as [W][block] of T; lanes past the last channel stay as they are.
template <class T>
void pack_row(const Tensor& tensor, int64_t image, int64_t channel, int64_t count, int64_t row, int64_t block,
              T* target) {
  pack(at(tensor, row_offset(tensor, image, channel, row)), tensor.dtype, tensor.size[3], count, tensor.stride[3],
       tensor.stride[1], target, block);
}

template <class T>
void unpack_row(const T* source, int64_t block, const Tensor& tensor, int64_t image, int64_t channel, int64_t count,
                int64_t row) {
  unpack(source, block, tensor.size[3], count, at_mutable(tensor, row_offset(tensor, image, channel, row)),
         tensor.dtype, tensor.stride[3], tensor.stride[1]);
}

// Rows of the convolution's output that pooled row `window` is responsible for: they divide all rows among them.
Span own_rows(const ReluPool2dForward& call, int64_t window) {
  const ConvPoolGeometry& g = call.geometry;
  const int64_t begin = window * g.pool_stride[0] - g.pool_padding[0];
  return {window == 0 ? 0 : begin, window + 1 == call.output.size[2] ? call.input.size[2] : begin + g.pool_stride[0]};
}

// Whether a row of the tensor is [W][K] of T as it lies (channels_last), so that loops may work on it in place.
template <class T>
bool rows_are_dense(const Tensor& tensor) {
  return tensor.dtype == kDType<T> && tensor.stride[1] == 1 && tensor.stride[3] == tensor.size[1] &&
         tensor.size[1] % kLanes<T> == 0;
}

// One pooled row.
template <class T>
bool forward_task(const ReluPool2dForward& call, int64_t task) {
  const ConvPoolGeometry& g = call.geometry;
  const int64_t pooled_h = call.output.size[2], pooled_w = call.output.size[3], width = call.input.size[3];
  const int64_t image = task / pooled_h, window = task % pooled_h, channels = call.input.size[1];
  const Span span = window_span(g, 0, window, call.input.size[2]);
  const Span rows = call.relu_in_place ? own_rows(call, window) : span;
  const bool dense = rows_are_dense<T>(call.input);
  const int64_t widest = dense ? channels : kBlock<T>;
  const int64_t row_elements = dense ? 0 : width * widest, pooled_elements = pooled_w * widest;
  const int64_t held = span.size() + call.relu_in_place;  // the last for a row between windows, of which there are many
  const int64_t elements = held * row_elements + 2 * pooled_elements;
  T* buffer = static_cast<T*>(scratch(elements * int64_t{sizeof(T)}));
  if (buffer == nullptr) return false;
  T* values = buffer + held * row_elements;
  Int<T>* positions = reinterpret_cast<Int<T>*>(values + pooled_elements);
  const auto in_window = [&](int64_t row) { return row >= span.begin && row < span.end; };
  const auto row_of = [&](int64_t row) {
    return dense ? static_cast<T*>(at_mutable(call.input, row_offset(call.input, image, 0, row)))
                 : buffer + (in_window(row) ? row - span.begin : span.size()) * row_elements;
  };

  // Lanes past the last channel are pooled too.
  memset(buffer, 0, static_cast<size_t>(held * row_elements) * sizeof(T));
  for (int64_t channel = 0; channel < channels; channel += widest) {
    const int64_t count = min_of(widest, channels - channel), block = round_up(count, kLanes<T>);
    const T* window_rows[kCut];
    for (int64_t row = span.begin; row < span.end; ++row) {
      if (!dense) pack_row(call.input, image, channel, count, row, block, row_of(row));
      window_rows[row - span.begin] = row_of(row);
    }
    pool_row(window_rows, span, window, width, g, pooled_w, block, values, positions);
    unpack_pooled(values, positions, block, image, channel, count, window, call.output, call.positions);
    if (!call.relu_in_place) continue;
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      if (!dense && !in_window(row)) pack_row(call.input, image, channel, count, row, block, row_of(row));
      relu_mask(row_of(row), row_of(row), width * block, row_of(row));
      if (!dense) unpack_row(row_of(row), block, call.input, image, channel, count, row);
    }
  }
  return true;
}

template <class T>
void forward(const ReluPool2dForward& call) {
  if (!call.output.data || !call.input.data) return;
  for_each_task(call.output.size[0] * call.output.size[2], call.threads,
                [&](int64_t task) { return forward_task<T>(call, task); });
}

// Adds a pooled row's gradient to those of its windows' positions that lie in `rows` of the dense gradient.
template <class T>
void scatter_row(const ReluPool2dBackward& call, int64_t window, Span rows, int64_t block, const T* gradient,
                 const Int<T>* positions, T* dense) {
  const ConvPoolGeometry& g = call.geometry;
  const int64_t width = call.grad_input.size[3];
  const int64_t top = window * g.pool_stride[0] - g.pool_padding[0];
  const Span span = {max_of(top, rows.begin), min_of(top + g.pool_size[0], rows.end)};
  for (int64_t p = 0; p < call.grad_output.size[3]; ++p) {
    const Span columns = window_span(g, 1, p, width);
    const int64_t left = p * g.pool_stride[1] - g.pool_padding[1];
    for (int64_t lane = 0; lane < block; lane += kLanes<T>) {
      const Vec<T> value = load(gradient + p * block + lane);
      IntVec<T> where;
      memcpy(&where, positions + p * block + lane, sizeof where);
      for (int64_t row = span.begin; row < span.end; ++row) {
        for (int64_t column = columns.begin; column < columns.end; ++column) {
          T* target = dense + ((row - rows.begin) * width + column) * block + lane;
          const Int<T> position = static_cast<Int<T>>((row - top) * g.pool_size[1] + column - left);
          store<T>(target, load(target) + (where == position - IntVec<T>{} ? value : Vec<T>{}));
        }
      }
    }
  }
}

// Where in a plane of [H, W] the positions of a window lie, from its first row and column on.
template <class T>
struct PlaneOffsets {
  int64_t offset[kCut + 1] = {};
  Int<T> counts[kCut + 1] = {};  // all bits set but for kCut: a mask in place of a branch to mispredict

  PlaneOffsets(const ConvPoolGeometry& g, int64_t width) {
    for (int64_t i = 0; i < g.pool_size[0] * g.pool_size[1]; ++i) {
      offset[i] = i / g.pool_size[1] * width + i % g.pool_size[1];
      counts[i] = -1;
    }
  }
};

// Adds a row of windows' gradients to a plane's rows from `base` on, each at its position.
template <class T>
void scatter_windows(const ReluPool2dBackward& call, const PlaneOffsets<T>& offsets, int64_t window_row, int64_t base,
                     const T* gradient, const uint8_t* positions, T* plane) {
  const ConvPoolGeometry& g = call.geometry;
  const int64_t step = call.positions.stride[3], stride = g.pool_stride[1];
  const int64_t top = window_row * g.pool_stride[0] - g.pool_padding[0] - base;
  int64_t corner = top * call.grad_input.size[3] - g.pool_padding[1];
  for (int64_t p = 0; p < call.grad_output.size[3]; ++p, corner += stride, positions += step) {
    Int<T> bits;
    memcpy(&bits, gradient + p, sizeof bits);
    bits &= offsets.counts[*positions];
    T value;
    memcpy(&value, &bits, sizeof value);
    plane[max_of(corner + offsets.offset[*positions], 0)] += value;  // a window that was cut may begin in the padding
  }
}

// A channel's row of [N, K, H, W], where it lies, or else packed into the buffer.
template <class T>
const T* dense_row(const Tensor& tensor, int64_t image, int64_t channel, int64_t row, T* buffer) {
  if (tensor.dtype == kDType<T> && tensor.stride[3] == 1)
    return static_cast<const T*>(at(tensor, row_offset(tensor, image, channel, row)));
  pack_row(tensor, image, channel, 1, row, 1, buffer);
  return buffer;
}

// The dense gradient of a channel of an image, in NCHW. Where it isn't summed in place, a few rows are held at a time.
template <class T>
bool backward_plane(const ReluPool2dBackward& call, const PlaneOffsets<T>& offsets, int64_t image, int64_t channel) {
  const Tensor& output = call.grad_input;
  const int64_t height = output.size[2], width = output.size[3];
  const int64_t pooled_h = call.grad_output ? call.grad_output.size[2] : 0,
                pooled_w = call.grad_output ? call.grad_output.size[3] : 0;
  const bool in_place = output.dtype == kDType<T> && output.stride[2] == width;
  const int64_t fitting = kPooledRowsBytes / (width * int64_t{sizeof(T)}) + 1;
  const int64_t held = in_place ? height : min_of(fitting + call.geometry.pool_size[0], height);
  T* skip = static_cast<T*>(scratch((2 * width + pooled_w + (in_place ? 0 : held * width)) * int64_t{sizeof(T)}));
  if (skip == nullptr) return false;
  T *grad_skip = skip + width, *gradient = grad_skip + width;
  T* plane =
      in_place ? static_cast<T*>(at_mutable(output, row_offset(output, image, channel, 0))) : gradient + pooled_w;
  int64_t base = 0;  // the first row that is held
  const auto begin_rows = [&](Span rows) {
    T* target = plane + (rows.begin - base) * width;
    if (!call.grad_skip) memset(target, 0, static_cast<size_t>(rows.size() * width) * sizeof(T));
    for (int64_t row = rows.begin; call.grad_skip && row < rows.end; ++row, target += width)
      relu_mask(dense_row(call.skip, image, channel, row, skip),
                dense_row(call.grad_skip, image, channel, row, grad_skip), width, target);
  };
  const auto finish_rows = [&](int64_t end) {
    for (int64_t row = base; !in_place && row < end; ++row)
      unpack_row(plane + (row - base) * width, 1, output, image, channel, 1, row);
  };
  const auto hold = [&](Span window) {  // no later window begins above it
    while (window.end > base + held) {
      const int64_t done = min_of(window.begin - base, held), kept = held - done;
      finish_rows(base + done);
      memmove(plane, plane + done * width, static_cast<size_t>(kept * width) * sizeof(T));
      base += done;
      begin_rows({base + kept, min_of(base + held, height)});
    }
  };
  begin_rows({0, held});
  for (int64_t row = 0; row < pooled_h; ++row) {
    hold(window_span(call.geometry, 0, row, height));
    scatter_windows(call, offsets, row, base, dense_row(call.grad_output, image, channel, row, gradient),
                    static_cast<const uint8_t*>(call.positions.data) + row_offset(call.positions, image, channel, row),
                    plane);
  }
  hold({height, height});
  finish_rows(height);
  return true;
}

// Whether the dense gradient is the pooled one where that counts, element by element of the same memory.
template <class T>
bool is_elementwise(const ReluPool2dBackward& call) {
  const ConvPoolGeometry& g = call.geometry;
  bool same = call.grad_output && !call.grad_skip && call.grad_input.dtype == kDType<T>;
  for (int i = 0; i < 2; ++i) same = same && g.pool_size[i] == 1 && g.pool_stride[i] == 1 && g.pool_padding[i] == 0;
  int64_t elements = 1, last = 0;
  for (int i = 0; same && i < 4; ++i) {
    const int64_t stride = call.grad_input.stride[i], size = call.grad_input.size[i];
    same = size == 1 || (call.grad_output.stride[i] == stride && call.positions.stride[i] == stride);
    elements *= size, last += (size - 1) * stride;
  }
  return same && last + 1 == elements;
}

template <class T>
void backward_elements(const ReluPool2dBackward& call, Span elements) {
  const T* gradient = static_cast<const T*>(call.grad_output.data);
  const uint8_t* positions = static_cast<const uint8_t*>(call.positions.data);
  T* dense = static_cast<T*>(call.grad_input.data);
  for (int64_t i = elements.begin; i < elements.end; ++i) dense[i] = positions[i] == kCut ? 0 : gradient[i];
}

// A band of the dense gradient's rows, channels in lanes.
template <class T>
bool backward_task(const ReluPool2dBackward& call, int64_t band, int64_t task) {
  const Tensor& output = call.grad_input;
  const int64_t height = output.size[2], width = output.size[3], channels = output.size[1];
  const int64_t bands = ceil_div(height, band), image = task / bands;
  const Span rows = {task % bands * band, min_of((task % bands + 1) * band, height)};
  const int64_t pooled_w = call.grad_output ? call.grad_output.size[3] : 0;
  const bool in_place = rows_are_dense<T>(output) && output.stride[2] == width * channels;
  const int64_t widest = in_place ? channels : kBlock<T>;
  const int64_t band_elements = in_place ? 0 : rows.size() * width * widest, pooled_elements = pooled_w * widest;
  const int64_t elements = band_elements + width * widest + 2 * pooled_elements;
  T* buffer = static_cast<T*>(scratch(elements * int64_t{sizeof(T)}));
  if (buffer == nullptr) return false;
  T* dense = in_place ? static_cast<T*>(at_mutable(output, row_offset(output, image, 0, rows.begin))) : buffer;
  T* skip = buffer + band_elements;
  T* gradient = skip + width * widest;
  Int<T>* positions = reinterpret_cast<Int<T>*>(gradient + pooled_elements);
  memset(skip, 0, static_cast<size_t>(elements - band_elements) * sizeof(T));  // lanes past the last channel

  for (int64_t channel = 0; channel < channels; channel += widest) {
    const int64_t count = min_of(widest, channels - channel), block = round_up(count, kLanes<T>);
    memset(dense, 0, static_cast<size_t>(rows.size() * width * block) * sizeof(T));
    for (int64_t row = rows.begin; call.grad_skip && row < rows.end; ++row) {
      T* target = dense + (row - rows.begin) * width * block;
      pack_row(call.grad_skip, image, channel, count, row, block, target);
      pack_row(call.skip, image, channel, count, row, block, skip);
      relu_mask(skip, target, width * block, target);
    }
    const Span windows = call.grad_output ? windows_of(call.geometry, 0, rows, call.grad_output.size[2]) : Span{0, 0};
    for (int64_t window = windows.begin; window < windows.end; ++window) {
      pack_row(call.grad_output, image, channel, count, window, block, gradient);
      pack_from(static_cast<const uint8_t*>(call.positions.data) + row_offset(call.positions, image, channel, window),
                pooled_w, count, call.positions.stride[3], call.positions.stride[1], positions, block);
      scatter_row(call, window, rows, block, gradient, positions, dense);
    }
    for (int64_t row = rows.begin; !in_place && row < rows.end; ++row)
      unpack_row(dense + (row - rows.begin) * width * block, block, output, image, channel, count, row);
  }
  return true;
}

template <class T>
void backward(const ReluPool2dBackward& call) {
  const Tensor& output = call.grad_input;
  if (!output.data) return;
  if (is_elementwise<T>(call)) {
    const int64_t all = output.size[0] * output.size[1] * output.size[2] * output.size[3];
    const int64_t chunk = kPooledRowsBytes / int64_t{sizeof(T)};
    return for_each_task(ceil_div(all, chunk), call.threads, [&](int64_t task) {
      backward_elements<T>(call, {task * chunk, min_of((task + 1) * chunk, all)});
      return true;
    });
  }
  if (output.stride[3] == 1 && output.size[3] > 1) {
    const PlaneOffsets<T> offsets(call.geometry, output.size[3]);
    return for_each_task(output.size[0] * output.size[1], call.threads, [&](int64_t plane) {
      return backward_plane<T>(call, offsets, plane / output.size[1], plane % output.size[1]);
    });
  }
  const int64_t widest = rows_are_dense<T>(output) ? output.size[1] : kBlock<T>;
  const int64_t row_bytes = output.size[3] * widest * int64_t{sizeof(T)};
  const int64_t fitting = max_of(kPooledRowsBytes / row_bytes, 1);
  // Whole windows to a band, where they don't overlap, and few rows between them.
  const int64_t band =
      round_up(fitting, min_of(call.geometry.pool_stride[0], max_of(fitting, call.geometry.pool_size[0])));
  for_each_task(output.size[0] * ceil_div(output.size[2], band), call.threads,
                [&](int64_t task) { return backward_task<T>(call, band, task); });
}

}  // namespace

void relu_pool2d_forward(const ReluPool2dForward& call) {
  call.input.dtype == DType::kFloat64 ? forward<double>(call) : forward<float>(call);
}

void relu_pool2d_backward(const ReluPool2dBackward& call) {
  call.grad_input.dtype == DType::kFloat64 ? backward<double>(call) : backward<float>(call);
}

}  // namespace FASTSEG_ISA
}  // namespace fastseg

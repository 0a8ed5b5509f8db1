// conv_relu_pool2d, backward, the direct road. The gradient after a pool is sparse: at most one position of a window
// carries any. So per pooled pixel and channel there is one patch of the input to weigh, not one for every position,
// and the dense gradient of the full-resolution map is never built.
//
//   grad_weight[k] = sum over windows of grad_output[k] * patch(position of the maximum)
//   grad_input     = sum over windows and k of grad_output[k] * weight[k], added where that patch lies
#include "conv_relu_pool2d.h"
#include "conv_tile.h"
#include "parallel.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

// The sum of a weight gradient is cut into parts by the shape alone, never by the number of threads, and the parts are
// added in their order: two runs are bitwise equal.
constexpr int64_t kLargestParts = 64;
constexpr int64_t kPatchBytes = 96 * 1024;  // patches of one tile of windows: a share of a second-level cache
constexpr int64_t kLeastTile = 8;           // windows
constexpr int64_t kBandBytes = 128 * 1024;  // a band of the packed input's gradient: half of a second-level cache
constexpr int kPatchVectors = 6;            // vectors of a patch in registers, for two windows at a time

// By position in a window of the row in work: where its patch begins, or negative where it carries no gradient.
struct PatchTable {
  int32_t patch[kCut + 1];
};

// The windows of one row and channel that carry gradient: its value, and where their patch begins.
template <class T>
struct Active {
  T* gradient;
  int32_t* patch;
  int64_t count;
};

template <class T>
struct Backward {
  const ConvReluPool2dBackward& call;
  const ConvShape shape;
  const int64_t packed_w;  // columns of a packed input row
  const int64_t taps;      // of a patch, rounded up to whole vectors
  const int64_t tile;      // windows of a row whose patches are built together

  explicit Backward(const ConvReluPool2dBackward& c)
      : call(c),
        shape(c.input, c.weight, c.grad_output, c.geometry),
        packed_w(most(packed_width(shape, c.geometry, shape.convolved_w), shape.w + c.geometry.padding[1])),
        taps(round_up(shape.taps(), kLanes<T>)),
        tile(choose_tile()) {}

  // The convolution's columns that `windows` neighbouring windows of a row cover.
  int64_t covered(int64_t windows) const {
    return (windows - 1) * call.geometry.pool_stride[1] + call.geometry.pool_size[1];
  }

  int64_t choose_tile() const {
    const int64_t column_bytes = call.geometry.pool_size[0] * taps * int64_t{sizeof(T)};
    int64_t windows = least(kLeastTile, shape.pooled_w);
    while (windows < shape.pooled_w && covered(windows + 1) * column_bytes <= kPatchBytes) ++windows;
    return windows;
  }

  // With room for the vector that the last piece of the last patch may run over by.
  int64_t patch_elements() const { return call.geometry.pool_size[0] * covered(tile) * taps + kLanes<T>; }

  // Elements of T that `tile` windows' active list takes (gradients, then as many 32-bit offsets).
  int64_t active_elements() const { return 2 * tile; }

  Active<T> active_in(T* memory) const { return {memory, reinterpret_cast<int32_t*>(memory + tile), 0}; }

  // Positions outside the convolution's rows `span` are left out, as are windows whose maximum ReLU cut.
  PatchTable patch_table(int64_t row, Span span) const {
    const ConvPoolGeometry& g = call.geometry;
    const int64_t top = row * g.pool_stride[0] - g.pool_padding[0];
    PatchTable table;
    for (int32_t& patch : table.patch) patch = -1;
    for (int64_t y = most(span.begin - top, 0); y < least(g.pool_size[0], span.end - top); ++y)
      for (int64_t x = 0; x < g.pool_size[1]; ++x)
        table.patch[y * g.pool_size[1] + x] = static_cast<int32_t>((y * covered(tile) + x) * taps);
    return table;
  }

  // Lists the windows of a pooled row that carry gradient of channel k, and returns the sum of it.
  T list_active(int64_t image, int64_t k, int64_t row, Span windows, const PatchTable& table, Active<T>* active) const {
    const Tensor &gradient = call.grad_output, &positions = call.positions;
    pack(at(gradient, image * gradient.stride[0] + k * gradient.stride[1] + row * gradient.stride[2] +
                          windows.begin * gradient.stride[3]),
         gradient.dtype, 1, windows.size(), 0, gradient.stride[3], active->gradient, 0);
    const int64_t step = positions.stride[3];
    const uint8_t* position = static_cast<const uint8_t*>(positions.data) + image * positions.stride[0] +
                              k * positions.stride[1] + row * positions.stride[2] + windows.begin * step;
    const int32_t window_step = static_cast<int32_t>(call.geometry.pool_stride[1] * taps);
    int64_t count = 0;
    int32_t window = 0;  // where the window's patches begin
    for (int64_t p = 0; p < windows.size(); ++p, window += window_step) {
      const int32_t patch = table.patch[position[p * step]];
      // Written always, kept only where the window counts: no branch to mispredict.
      active->gradient[count] = active->gradient[p];
      active->patch[count] = patch + window;
      count += patch >= 0;
    }
    active->count = count;
    return sum_of(active->gradient, count);
  }

  static T sum_of(const T* values, int64_t count) {
    Vec<T> sums = {};
    int64_t i = 0;
    for (; i + kLanes<T> <= count; i += kLanes<T>) sums += load(values + i);
    T sum = 0;
    for (int lane = 0; lane < kLanes<T>; ++lane) sum += sums[lane];
    for (; i < count; ++i) sum += values[i];
    return sum;
  }

  // The patches of all positions of a tile of windows: [pool rows][covered columns][taps], from packed input rows.
  void build_patches(const T* input, int64_t row, Span windows, Span rows, T* patches) const {
    for_each_patch(row, windows, [&](int64_t patch, int64_t input_row, int64_t input_column) {
      T* target = patches + patch;
      const T* source = input + ((input_row - rows.begin) * packed_w + input_column) * shape.c;
      // Whole vectors: what runs over a piece's end is overwritten by the next piece, or lies past the taps.
      for_each_segment([&](int64_t offset, int64_t length) {
        for (int64_t i = 0; i < length; i += kLanes<T>) store<T>(target + i, load(source + offset + i));
        target += length;
      });
    });
  }

  // Calls visit(patch, input row, packed input column) for the convolution's positions in a tile of windows: where
  // their patch begins in the tile's memory, and in the input.
  template <class Visit>
  void for_each_patch(int64_t row, Span windows, Visit visit) const {
    const ConvPoolGeometry& g = call.geometry;
    const int64_t top = row * g.pool_stride[0] - g.pool_padding[0];
    const int64_t left = windows.begin * g.pool_stride[1] - g.pool_padding[1];
    const Span span = window_span(g, 0, row, shape.convolved_h);
    const Span columns = {most(left, 0), least(left + covered(windows.size()), shape.convolved_w)};
    for (int64_t y = span.begin; y < span.end; ++y)
      for (int64_t x = columns.begin; x < columns.end; ++x)
        visit(((y - top) * covered(tile) + x - left) * taps, y * g.stride[0] - g.padding[0], x * g.stride[1]);
  }

  // Calls visit(offset in the packed input, length) for the contiguous pieces of a patch, in the order of the taps.
  template <class Visit>
  void for_each_segment(Visit visit) const {
    const int64_t* dilation = call.geometry.dilation;
    const bool whole_rows = dilation[1] == 1;
    for (int64_t row = 0; row < shape.kernel_h; ++row) {
      const int64_t offset = row * dilation[0] * packed_w * shape.c;
      if (whole_rows) {
        visit(offset, shape.kernel_w * shape.c);
        continue;
      }
      for (int64_t column = 0; column < shape.kernel_w; ++column)
        visit(offset + column * dilation[1] * shape.c, shape.c);
    }
  }

  // sum += gradient * patch over the active windows, for Vectors vectors of taps.
  template <int Vectors>
  static void weigh_patches(const Active<T>& active, const T* patches, T* sum) {
    Vec<T> even[Vectors] = {}, odd[Vectors] = {};
    int64_t i = 0;
    for (; i + 2 <= active.count; i += 2) {
      const T *first = patches + active.patch[i], *second = patches + active.patch[i + 1];
      const T g0 = active.gradient[i], g1 = active.gradient[i + 1];
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) {
        even[v] += broadcast(g0) * load(first + v * kLanes<T>);
        odd[v] += broadcast(g1) * load(second + v * kLanes<T>);
      }
    }
    if (i < active.count)
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v)
        even[v] += broadcast(active.gradient[i]) * load(patches + active.patch[i] + v * kLanes<T>);
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) store<T>(sum + v * kLanes<T>, load(sum + v * kLanes<T>) + (even[v] + odd[v]));
  }

  void add_weighed(const Active<T>& active, const T* patches, T* sum) const {
    int64_t vectors = taps / kLanes<T>;
    for (; vectors >= kPatchVectors; vectors -= kPatchVectors) {
      weigh_patches<kPatchVectors>(active, patches, sum);
      patches += kPatchVectors * kLanes<T>;
      sum += kPatchVectors * kLanes<T>;
    }
    switch (vectors) {
      case 1:
        return weigh_patches<1>(active, patches, sum);
      case 2:
        return weigh_patches<2>(active, patches, sum);
      case 3:
        return weigh_patches<3>(active, patches, sum);
      case 4:
        return weigh_patches<4>(active, patches, sum);
      case 5:
        return weigh_patches<5>(active, patches, sum);
    }
  }

  // Part `part` of the weight's and bias's gradient: a range of pooled rows, counted through all images.
  bool weight_part(int64_t part, int64_t parts, T* grad_weight, T* grad_bias) const {
    const ConvPoolGeometry& g = call.geometry;
    const int64_t pooled_rows = shape.n * shape.pooled_h;
    memset(grad_weight, 0, static_cast<size_t>(shape.k * taps) * sizeof(T));
    memset(grad_bias, 0, static_cast<size_t>(shape.k) * sizeof(T));
    const int64_t input_rows_of_window = (g.pool_size[0] - 1) * g.stride[0] + (shape.kernel_h - 1) * g.dilation[0] + 1;
    const int64_t input_elements = input_rows_of_window * packed_w * shape.c;
    T* input = static_cast<T*>(scratch((input_elements + patch_elements() + active_elements()) * int64_t{sizeof(T)}));
    if (input == nullptr) return false;
    T* patches = input + input_elements;
    Active<T> active = active_in(patches + patch_elements());

    for (int64_t r = part * pooled_rows / parts; r < (part + 1) * pooled_rows / parts; ++r) {
      const int64_t image = r / shape.pooled_h, row = r % shape.pooled_h;
      const Span span = window_span(g, 0, row, shape.convolved_h), rows = input_rows(shape, g, span);
      const PatchTable table = patch_table(row, span);
      if (call.grad_weight) pack_input(call.input, shape, g, image, rows, packed_w, input);
      for (int64_t first = 0; first < shape.pooled_w; first += tile) {
        const Span windows = {first, least(first + tile, shape.pooled_w)};
        if (call.grad_weight) build_patches(input, row, windows, rows, patches);
        for (int64_t k = 0; k < shape.k; ++k) {
          grad_bias[k] += list_active(image, k, row, windows, table, &active);
          if (call.grad_weight) add_weighed(active, patches, grad_weight + k * taps);
        }
      }
    }
    return true;
  }

  // Adds the parts in their order and writes the gradients of channel k.
  void reduce(int64_t k, int64_t parts, const T* grad_weight, const T* grad_bias) const {
    const Tensor &weight = call.grad_weight, &bias = call.grad_bias;
    if (bias) {
      double sum = 0;
      for (int64_t part = 0; part < parts; ++part) sum += static_cast<double>(grad_bias[part * shape.k + k]);
      const T value = static_cast<T>(sum);
      unpack(&value, 1, 1, 1, at_mutable(bias, k * bias.stride[0]), bias.dtype, 1, 1);
    }
    if (!weight) return;
    const T* tap = grad_weight + k * taps;
    for (int64_t row = 0; row < shape.kernel_h; ++row)
      for (int64_t column = 0; column < shape.kernel_w; ++column)
        for (int64_t c = 0; c < shape.c; ++c, ++tap) {
          double sum = 0;
          for (int64_t part = 0; part < parts; ++part) sum += static_cast<double>(tap[part * shape.k * taps]);
          const T value = static_cast<T>(sum);
          const int64_t offset =
              k * weight.stride[0] + c * weight.stride[1] + row * weight.stride[2] + column * weight.stride[3];
          unpack(&value, 1, 1, 1, at_mutable(weight, offset), weight.dtype, 1, 1);
        }
  }

  void weight_and_bias() const {
    const int64_t parts = least(kLargestParts, shape.n * shape.pooled_h);
    Workspace workspace(parts * shape.k * (taps + 1) * int64_t{sizeof(T)});
    T* grad_weight = static_cast<T*>(workspace.data());
    T* grad_bias = grad_weight + parts * shape.k * taps;
    for_each_task(parts, call.threads, [&](int64_t part) {
      return weight_part(part, parts, grad_weight + part * shape.k * taps, grad_bias + part * shape.k);
    });
    for_each_task(shape.k, call.threads, [&](int64_t k) {
      reduce(k, parts, grad_weight, grad_bias);
      return true;
    });
  }

  // patches += gradient * kernel, where each active window's patch lies.
  static void spread_kernel(const Active<T>& active, const T* kernel, int64_t taps, T* patches) {
    for (int64_t i = 0; i < active.count; ++i) {
      T* patch = patches + active.patch[i];
      const T gradient = active.gradient[i];
      for (int64_t tap = 0; tap < taps; tap += kLanes<T>)
        store<T>(patch + tap, load(patch + tap) + broadcast(gradient) * load(kernel + tap));
    }
  }

  // Adds the patches of the convolution's positions to those rows of the packed input's gradient that are in `band`.
  void add_patches(const T* patches, int64_t row, Span windows, Span band, T* target) const {
    const int64_t pitch = packed_w * shape.c;
    for_each_patch(row, windows, [&](int64_t patch, int64_t input_row, int64_t input_column) {
      const T* source = patches + patch;
      for_each_segment([&](int64_t offset, int64_t length) {
        const int64_t at_row = input_row - band.begin + offset / pitch;
        if (at_row >= 0 && at_row < band.size()) {
          T* to = target + at_row * pitch + input_column * shape.c + offset % pitch;
          for (int64_t i = 0; i < length; ++i) to[i] += source[i];
        }
        source += length;
      });
    });
  }

  // The gradient of a band of the input's rows: every window that reaches it is gone through, so that no two tasks
  // write one row.
  bool input_band(int64_t task, int64_t band_rows, const T* kernels) const {
    const ConvPoolGeometry& g = call.geometry;
    const int64_t bands = ceil_div(shape.h, band_rows), image = task / bands;
    const Span band = {task % bands * band_rows, least((task % bands + 1) * band_rows, shape.h)};
    const int64_t band_elements = band.size() * packed_w * shape.c;
    T* target = static_cast<T*>(scratch((band_elements + patch_elements() + active_elements()) * int64_t{sizeof(T)}));
    if (target == nullptr) return false;
    T* patches = target + band_elements;
    Active<T> active = active_in(patches + patch_elements());
    memset(target, 0, static_cast<size_t>(band_elements) * sizeof(T));

    // The convolution's rows that read the band, and the windows that hold them.
    const int64_t reach = (shape.kernel_h - 1) * g.dilation[0];
    const Span convolved = {most(ceil_div(band.begin + g.padding[0] - reach, g.stride[0]), 0),
                            least((band.end - 1 + g.padding[0]) / g.stride[0] + 1, shape.convolved_h)};
    const Span window_rows = convolved.begin < convolved.end ? windows_of(g, 0, convolved, shape.pooled_h) : Span{0, 0};
    for (int64_t row = window_rows.begin; row < window_rows.end; ++row) {
      const PatchTable table = patch_table(row, convolved);
      for (int64_t first = 0; first < shape.pooled_w; first += tile) {
        const Span windows = {first, least(first + tile, shape.pooled_w)};
        memset(patches, 0, static_cast<size_t>(patch_elements()) * sizeof(T));
        for (int64_t k = 0; k < shape.k; ++k) {
          list_active(image, k, row, windows, table, &active);
          spread_kernel(active, kernels + k * taps, taps, patches);
        }
        add_patches(patches, row, windows, band, target);
      }
    }
    const Tensor& gradient = call.grad_input;
    for (int64_t row = band.begin; row < band.end; ++row)
      unpack(target + ((row - band.begin) * packed_w + g.padding[1]) * shape.c, shape.c, shape.w, shape.c,
             at_mutable(gradient, image * gradient.stride[0] + row * gradient.stride[2]), gradient.dtype,
             gradient.stride[3], gradient.stride[1]);
    return true;
  }

  void input() const {
    Workspace workspace(shape.k * taps * int64_t{sizeof(T)});
    T* kernels = static_cast<T*>(workspace.data());
    memset(kernels, 0, static_cast<size_t>(shape.k * taps) * sizeof(T));
    for (int64_t k = 0; k < shape.k; ++k) pack_kernel(call.weight, shape, k, kernels + k * taps, 1);
    const int64_t row_bytes = packed_w * shape.c * int64_t{sizeof(T)};
    const int64_t band_rows = most(kBandBytes / most(row_bytes, 1), 1);
    for_each_task(shape.n * ceil_div(shape.h, band_rows), call.threads,
                  [&](int64_t task) { return input_band(task, band_rows, kernels); });
  }
};

template <class T>
void backward(const ConvReluPool2dBackward& call) {
  const Backward<T> kernel(call);
  if (call.grad_weight || call.grad_bias) kernel.weight_and_bias();
  if (call.grad_input) kernel.input();
}

}  // namespace

void conv_relu_pool2d_backward(const ConvReluPool2dBackward& call) {
  call.input.dtype == DType::kFloat64 ? backward<double>(call) : backward<float>(call);
}

}  // namespace FASTSEG_ISA
}  // namespace fastseg

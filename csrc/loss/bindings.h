// What the bindings of the operators on labels and upsampled logits share.
#pragma once

#include <string>

#include "core/bindings.h"
#include "loss/cross_entropy.h"
#include "upsampling/upsampling.h"

namespace fastseg {
namespace python {

// Whether there is anything along a tensor's dimensions from `first` on.
inline bool has_extent(const Tensor& tensor, int first) {
  for (int i = first; i < tensor.ndim; ++i)
    if (tensor.size[i] <= 0) return false;
  return true;
}

// Logits [N, C, h, w].
inline void check_logits(const Tensor& input) {
  require(input.ndim == 4 && is_floating(input) && has_extent(input, 1),
          "input is a floating-point [N, C, h, w] with classes, rows and columns");
}

// Logits [N, C, h, w] or [N, C, d, h, w] and, of the output's size, labels [N, H, W] or [N, D, H, W].
inline void check_map(const Tensor& input, const Tensor& labels) {
  require((input.ndim == 4 || input.ndim == 5) && is_floating(input) && has_extent(input, 1),
          "input is a floating-point [N, C, h, w] or [N, C, d, h, w] with classes and pixels");
  require(
      labels.ndim == input.ndim - 1 && !is_floating(labels) && labels.size[0] == input.size[0] && has_extent(labels, 1),
      "labels are integers [N, H, W] or [N, D, H, W] with pixels");
}

// From fastseg.ops.upsampling.Upsampling, of a grid for input.
inline Upsampling read_upsampling(const py::object& upsampling, const Tensor& input) {
  const auto mode = upsampling.attr("mode").cast<std::string>();
  const py::tuple steps = upsampling.attr("steps");
  require(mode == "nearest" || mode == "bilinear" || mode == "trilinear", "a mode is known");
  require(static_cast<int>(steps.size()) == input.ndim - 2 && (input.ndim == 4 || input.ndim == 5),
          "each axis has a step");
  Upsampling grid = {
      mode == "nearest" ? Mode::kNearest : Mode::kLinear, upsampling.attr("align_corners").cast<bool>(), {1, 1, 1}};
  for (int axis = 0; axis < input.ndim - 2; ++axis) {
    double& step = grid.step[axis + 5 - input.ndim];
    step = steps[axis].cast<double>();
    require(step >= 0, "a step is not negative");
  }
  return grid;
}

// Runs a kernel without the interpreter lock; raises an IndexError for a label that is neither a class nor ignored.
template <class Call>
void run_with_labels(Call& call, void (*kernel)(const Call&)) {
  InvalidLabel invalid = {};
  call.invalid = &invalid;
  {
    py::gil_scoped_release unlocked;
    kernel(call);
  }
  if (!invalid.found) return;
  const std::string ignored =
      call.ignore_index == kIgnoreNone ? "" : " or ignore_index (" + std::to_string(call.ignore_index) + ")";
  throw py::index_error("target: expected classes in [0, " + std::to_string(call.input.size[1]) + ")" + ignored +
                        ", got " + std::to_string(invalid.value));
}

}  // namespace python
}  // namespace fastseg

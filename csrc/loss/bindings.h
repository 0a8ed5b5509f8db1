// What the bindings of the operators on labels and upsampled logits share.
#pragma once

#include <string>
#include <utility>

#include "core/bindings.h"
#include "loss/cross_entropy.h"
#include "upsampling/upsampling.h"

namespace fastseg {
namespace python {

// Logits [N, C, h, w].
inline void check_logits(const Tensor& input) {
  require(input.ndim == 4 && is_floating(input) && input.size[1] > 0 && input.size[2] > 0 && input.size[3] > 0,
          "input is a floating-point [N, C, h, w] with classes, rows and columns");
}

// Logits [N, C, h, w] and, of the output's size, labels [N, H, W].
inline void check_map(const Tensor& input, const Tensor& labels) {
  check_logits(input);
  require(labels.ndim == 3 && !is_floating(labels) && labels.size[0] == input.size[0] && labels.size[1] > 0 &&
              labels.size[2] > 0,
          "labels are integers [N, H, W] with rows and columns");
}

// From fastseg.ops.upsampling.Upsampling.
inline Upsampling read_upsampling(const py::object& upsampling) {
  const auto mode = upsampling.attr("mode").cast<std::string>();
  const auto steps = upsampling.attr("steps").cast<std::pair<double, double>>();
  require((mode == "nearest" || mode == "bilinear") && steps.first >= 0 && steps.second >= 0,
          "a mode is known, and a step is not negative");
  return {mode == "nearest" ? Mode::kNearest : Mode::kBilinear,
          upsampling.attr("align_corners").cast<bool>(),
          {steps.first, steps.second}};
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

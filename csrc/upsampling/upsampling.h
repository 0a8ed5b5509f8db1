// Which positions of the input an upsampled position is made of: the grids of torch.nn.functional.interpolate.
#pragma once

#include <stdint.h>

namespace fastseg {

enum class Mode { kNearest, kLinear };  // kLinear: along every axis

struct Upsampling {
  Mode mode;
  bool align_corners;
  double step[3];  // of planes, rows and columns: how far apart neighbouring output positions are in the input
};

}  // namespace fastseg

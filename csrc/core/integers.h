// The arithmetic of sizes, in place of the standard library's: kernel files include none of its headers.
#pragma once

#include <stdint.h>

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

inline int64_t min_of(int64_t a, int64_t b) {
  return a < b ? a : b;
}
inline int64_t max_of(int64_t a, int64_t b) {
  return a > b ? a : b;
}
inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
inline int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

}  // namespace
}  // namespace FASTSEG_ISA
}  // namespace fastseg

// Vectorised max, exp and log, to one unit in the last place, for what a softmax asks of them.
#pragma once

#include "simd.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

template <class T>
struct MathConstants;

template <>
struct MathConstants<float> {
  static constexpr int kMantissaBits = 23, kExponentBias = 127;
  static constexpr int kExpDegree = 7;               // |r| <= log(2) / 2: the next term is below 6e-9
  static constexpr float kLowestExp = -87.3365402f;  // exp of less is subnormal
  static constexpr float kRounding = 12582912.0f;    // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLog2E = 1.44269504f;
  static constexpr float kLn2High = 6.9313812256e-01f;  // few enough digits that n * kLn2High is exact
  static constexpr float kLn2Low = 9.0580006145e-06f;
  static constexpr int32_t kSqrtHalf = 0x3f3504f3;  // bits of sqrt(1/2)
  static constexpr float kLog[] = {0.66666662693f, 0.40000972152f, 0.28498786688f, 0.24279078841f};
};

template <>
struct MathConstants<double> {
  static constexpr int kMantissaBits = 52, kExponentBias = 1023;
  static constexpr int kExpDegree = 13;  // the next term is below 5e-18
  static constexpr double kLowestExp = -708.39641853226408;
  static constexpr double kRounding = 6755399441055744.0;
  static constexpr double kLog2E = 1.44269504088896338700;
  static constexpr double kLn2High = 6.93147180369123816490e-01;
  static constexpr double kLn2Low = 1.90821492927058770002e-10;
  static constexpr int64_t kSqrtHalf = 0x3fe6a09e667f3bcd;
  static constexpr double kLog[] = {6.666666666666735130e-01, 3.999999999940941908e-01, 2.857142874366239149e-01,
                                    2.222219843214978396e-01, 1.818357216161805012e-01, 1.531383769920937332e-01,
                                    1.479819860511658591e-01};
};

// Of a NaN and a number, either.
template <class T>
FASTSEG_INLINE Vec<T> maximum(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

// if_true where the mask's lanes are set (all ones), else zero.
template <class T>
FASTSEG_INLINE Vec<T> select_or_zero(IntVec<T> mask, Vec<T> if_true) {
  return from_bits<T>(mask & bits_of<T>(if_true));
}

// exp(x) for x <= 0 and NaN; zero where the result would be subnormal.
// exp(x) = 2^n exp(r), r = x - n log(2), and Taylor's series of exp(r).
template <class T>
FASTSEG_INLINE Vec<T> exp_of_nonpositive(Vec<T> x) {
  using K = MathConstants<T>;
  // The sum's low bits hold n plus the exponent bias: shifted up, they are the bits of 2^n.
  const Vec<T> shifted = x * K::kLog2E + (K::kRounding + K::kExponentBias);
  const Vec<T> n = shifted - (K::kRounding + K::kExponentBias);
  const Vec<T> power = from_bits<T>(bits_of<T>(shifted) << K::kMantissaBits);
  const Vec<T> r = (x - n * K::kLn2High) - n * K::kLn2Low;
  T coefficient = 1;
  for (int k = 2; k <= K::kExpDegree; ++k) coefficient /= k;
  Vec<T> series = broadcast<T>(coefficient);
  for (int k = K::kExpDegree; k > 0; --k) {
    coefficient *= k;
    series = series * r + coefficient;
  }
  return select_or_zero<T>(~(x < K::kLowestExp), series * power);
}

// log(x) for normal x > 0 and NaN, by fdlibm's method (e_log.c): x = 2^k (1 + f), and with s = f / (2 + f),
// log(1 + f) = f - f^2 / 2 + s (f^2 / 2 + R(s^2)).
template <class T>
FASTSEG_INLINE Vec<T> log_of_positive(Vec<T> x) {
  using K = MathConstants<T>;
  const Int<T> one = static_cast<Int<T>>(K::kExponentBias) << K::kMantissaBits;
  const IntVec<T> offset = bits_of<T>(x) + (one - K::kSqrtHalf);
  const Vec<T> k = __builtin_convertvector((offset >> K::kMantissaBits) - K::kExponentBias, Vec<T>);
  const Int<T> mantissa = (static_cast<Int<T>>(1) << K::kMantissaBits) - 1;
  const Vec<T> f = from_bits<T>((offset & mantissa) + K::kSqrtHalf) - T(1);
  const Vec<T> s = f / (f + T(2)), z = s * s, half_square = f * f * T(0.5);
  Vec<T> series = Vec<T>{};
  for (int i = static_cast<int>(sizeof K::kLog / sizeof(T)) - 1; i >= 0; --i) series = (series + K::kLog[i]) * z;
  const Vec<T> result = k * K::kLn2High - ((half_square - (s * (half_square + series) + k * K::kLn2Low)) - f);
  return x == x ? result : x;
}

}  // namespace
}  // namespace FASTSEG_ISA
}  // namespace fastseg

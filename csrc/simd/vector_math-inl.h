// Vectorised max, exp and log, to one unit in the last place, for what a softmax asks of them.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "simd/simd-inl.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

template <class T>
struct MathConstants;

template <>
struct MathConstants<float> {
  static constexpr int kMantissaBits = 23, kExponentBias = 127;
  static constexpr float kExp[] = {1.0f,
                                   1.0f,
                                   5.0e-01f,
                                   1.666641533e-01f,
                                   4.166621715e-02f,
                                   8.375137113e-03f,
                                   1.394859282e-03f};  // error below 2e-8
  static constexpr float kLowestExp = -88.0296919f;    // -127 log(2): its power of two has the bits of zero
  static constexpr float kRounding = 12582912.0f;      // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLog2E = 1.44269504f;
  static constexpr float kLn2 = 6.93147180560e-01f;
  static constexpr float kLn2High = 6.9313812256e-01f;  // few enough digits that n * kLn2High is exact
  static constexpr float kLn2Low = 9.0580006145e-06f;
  static constexpr int32_t kSqrtHalf = 0x3f3504f3;  // bits of sqrt(1/2)
  static constexpr float kLog[] = {0.66666662693f, 0.40000972152f, 0.28498786688f, 0.24279078841f};
  static constexpr float kLogOfOnePlus[] = {8.109302199e-01f, -2.885271014e-01f, 1.326090158e-01f, -6.768818965e-02f,
                                            3.663523417e-02f, -2.056318243e-02f, 1.157768518e-02f, -6.788016952e-03f,
                                            5.250270678e-03f, -3.176057018e-03f};  // error below 6e-9
};

template <>
struct MathConstants<double> {
  static constexpr int kMantissaBits = 52, kExponentBias = 1023;
  static constexpr double kExp[] = {1.0,
                                    1.0,
                                    5.00000000000001887e-01,
                                    1.66666666666667018e-01,
                                    4.16666666664879393e-02,
                                    8.33333333330950679e-03,
                                    1.38888889523561352e-03,
                                    1.98412699092606447e-04,
                                    2.48014854384473795e-05,
                                    2.75572249183688686e-06,
                                    2.76326557593320313e-07,
                                    2.51148827869966869e-08};  // error below 2e-17
  static constexpr double kLowestExp = -709.08956571282405;    // -1023 log(2)
  static constexpr double kRounding = 6755399441055744.0;
  static constexpr double kLog2E = 1.44269504088896338700;
  static constexpr double kLn2 = 6.93147180559945309417e-01;
  static constexpr double kLn2High = 6.93147180369123816490e-01;
  static constexpr double kLn2Low = 1.90821492927058770002e-10;
  static constexpr int64_t kSqrtHalf = 0x3fe6a09e667f3bcd;
  static constexpr double kLog[] = {6.666666666666735130e-01, 3.999999999940941908e-01, 2.857142874366239149e-01,
                                    2.222219843214978396e-01, 1.818357216161805012e-01, 1.531383769920937332e-01,
                                    1.479819860511658591e-01};
  static constexpr double kLogOfOnePlus[] = {
      8.10930216216328764e-01, -2.88527099099323897e-01, 1.32609753754203754e-01, -6.76886433109642956e-02,
      3.66118545230444251e-02, -2.05488119191207142e-02, 1.18337921154982736e-02, -6.94539497498551294e-03,
      4.13617896949257887e-03, -2.49184119479886247e-03, 1.51538510533750961e-03, -9.28857427927732355e-04,
      5.73044608467786722e-04, -3.54820487831023811e-04, 2.21191708957665657e-04, -1.42100022899990296e-04,
      8.93330340681927138e-05, -4.48284432522325634e-05, 2.82780835856265438e-05, -3.83623743516012453e-05,
      2.44379739485809471e-05};  // error below 2e-17
};

// b where one of them is NaN: what x86's instruction gives, which compilers don't find where an argument is a constant.
template <class T>
FASTSEG_INLINE Vec<T> maximum(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == sizeof(float))
    return (Vec<T>)_mm512_max_ps((__m512)a, (__m512)b);
  else
    return (Vec<T>)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == sizeof(float))
    return (Vec<T>)_mm256_max_ps((__m256)a, (__m256)b);
  else
    return (Vec<T>)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
  return a > b ? a : b;
#endif
}

// if_true where the mask's lanes are set (all ones), else zero.
template <class T>
FASTSEG_INLINE Vec<T> select_or_zero(IntVec<T> mask, Vec<T> if_true) {
  return from_bits<T>(mask & bits_of<T>(if_true));
}

// exp(x) for x from kLowestExp, where it is zero, to -kLowestExp, and NaN.
// exp(x) = 2^n exp(r), r = x - n log(2), |r| <= log(2) / 2, and Chebyshev's series of exp(r).
template <class T>
FASTSEG_INLINE Vec<T> exp_within_range(Vec<T> x) {
  using K = MathConstants<T>;
  // The sum's low bits hold n plus the exponent bias: shifted up, they are the bits of 2^n.
  const Vec<T> shifted = x * K::kLog2E + (K::kRounding + K::kExponentBias);
  const Vec<T> n = shifted - (K::kRounding + K::kExponentBias);
  const Vec<T> power = from_bits<T>(bits_of<T>(shifted) << K::kMantissaBits);
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  const Vec<T> r = x - n * K::kLn2;  // the product isn't rounded: what is lost is n times the constant's own rounding
#else
  const Vec<T> r = (x - n * K::kLn2High) - n * K::kLn2Low;
#endif
  constexpr int kDegree = sizeof K::kExp / sizeof(T) - 1;
  Vec<T> series = broadcast<T>(K::kExp[kDegree]);
  for (int k = kDegree - 1; k >= 0; --k) series = series * r + K::kExp[k];
  return series * power;
}

// exp(x) for x <= 0 and NaN; zero from about the smallest normal number on.
template <class T>
FASTSEG_INLINE Vec<T> exp_of_nonpositive(Vec<T> x) {
  return exp_within_range<T>(maximum<T>(broadcast<T>(MathConstants<T>::kLowestExp), x));  // x where it is NaN
}

// 1 / (1 + exp(-x)), as a quotient without differences, which would cancel; NaN where x is.
template <class T>
FASTSEG_INLINE Vec<T> sigmoid_of(Vec<T> x) {
  const Vec<T> lowest = broadcast<T>(MathConstants<T>::kLowestExp);
  return T(1) / (exp_within_range<T>(maximum<T>(lowest, -maximum<T>(lowest, x))) + T(1));
}

// The same of x and of -x.
template <class T>
struct Sigmoid {
  Vec<T> exponential;     // exp(-|x|)
  Vec<T> value, counter;  // of x and of -x

  FASTSEG_INLINE explicit Sigmoid(Vec<T> x) {
    exponential = exp_of_nonpositive<T>(from_bits<T>(bits_of<T>(x) | bits_of<T>(broadcast<T>(T(-0.0)))));
    const Vec<T> larger = T(1) / (exponential + T(1)), smaller = exponential * larger;
    value = x > 0 ? larger : smaller;
    counter = x > 0 ? smaller : larger;
  }
};

// log(1 + x) for x in [0, 1] and NaN: x times a polynomial of x - 1/2, which interpolates log(1 + x) / x at
// Chebyshev's nodes.
template <class T>
FASTSEG_INLINE Vec<T> log_of_one_plus(Vec<T> x) {
  using K = MathConstants<T>;
  constexpr int kDegree = sizeof K::kLogOfOnePlus / sizeof(T) - 1;
  const Vec<T> centred = x - T(0.5);
  Vec<T> series = broadcast<T>(K::kLogOfOnePlus[kDegree]);
  for (int k = kDegree - 1; k >= 0; --k) series = series * centred + K::kLogOfOnePlus[k];
  return series * x;
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

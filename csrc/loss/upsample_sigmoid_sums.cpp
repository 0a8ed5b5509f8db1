// upsample_sigmoid_sums' CPU kernels. Classes know nothing of each other: forward goes over an output row class by
// class and adds up its terms; backward makes the terms' derivatives again, row by row, and nothing is kept between the
// two.
#include <math.h>

#include "core/cache.h"
#include "loss/cross_entropy_loops-inl.h"
#include "loss/losses.h"
#include "upsampling/upsampled_gradient-inl.h"

namespace fastseg {
namespace FASTSEG_ISA {
namespace {

constexpr int kRowsInCache = 2;          // a tile's two expanded input rows
constexpr int64_t kColumnsAdded = 1024;  // in T: the sums over more are added up in double

// What is summed: the class sums alone, with p t or the smaller of p and t, or with them cross-entropies that are
// multiplied by focal factors or not.
enum class Terms { kClassSums, kSmallerSums, kCrossEntropy, kFocal };

template <Terms kTerms>
constexpr bool kClassesAlone = kTerms == Terms::kClassSums || kTerms == Terms::kSmallerSums;

template <Terms kTerms>
constexpr int kSums = kClassesAlone<kTerms> ? 3 : 6;

template <class T>
FASTSEG_INLINE Vec<T> positive_part(Vec<T> x) {
  return maximum<T>(Vec<T>{}, x);  // x where it is NaN
}

template <class T>
struct FocalFactor {
  T gamma, scale, threshold;

  explicit FocalFactor(const UpsampleSigmoidSums& call)
      : gamma(static_cast<T>(call.gamma)),
        scale(call.threshold > 0 ? static_cast<T>(pow(call.threshold, -call.gamma)) : T(1)),
        threshold(static_cast<T>(call.threshold)) {}

  // The factor of logits whose targets they agree with by `signed_logit`, and its derivative for that.
  FASTSEG_INLINE void operator()(Vec<T> signed_logit, Vec<T>* factor, Vec<T>* slope) const {
    const Sigmoid<T> right(signed_logit);
    const Vec<T> loss_of_others = positive_part<T>(signed_logit) + log_of_one_plus<T>(right.exponential);
    const IntVec<T> focused = ~(right.value < threshold);
    const Vec<T> power = exp_of_nonpositive<T>(loss_of_others * -gamma) * scale;
    *factor = focused ? power : broadcast<T>(1);
    *slope = select_or_zero<T>(focused, power * right.value * -gamma);
  }
};

// Of a class, a row's shares and which of them count: of labels, or as they are given.
template <class T>
struct LabelShares {
  const Int<T>* labels;
  Int<T> c;

  FASTSEG_INLINE Vec<T> share(int64_t p) const {
    return select_or_zero<T>(load_labels<T>(labels + p) == c, broadcast<T>(1));
  }
  FASTSEG_INLINE IntVec<T> counts(int64_t p) const { return load_labels<T>(labels + p) != kIgnored; }
};

template <class T>
struct GivenShares {
  const T* shares;
  T ignored;
  int64_t ahead;  // to what a later row reads: classes' rows lie far apart, no processor expects the next one

  FASTSEG_INLINE Vec<T> share(int64_t p) const {
    __builtin_prefetch(shares + p + ahead);
    return load(shares + p);
  }
  FASTSEG_INLINE IntVec<T> counts(int64_t p) const { return ~(load(shares + p) == ignored); }
};

// The target's columns in an output row; whole blocks, with nothing that counts at the end.
template <class T>
class TargetRow {
 public:
  static int64_t elements(const UpsampledMap<T>& map) { return map.row_stride; }

  TargetRow(const UpsampleSigmoidSums& call, InvalidLabel* invalid, T* memory)
      : call_(call), memory_(memory), invalid_(invalid) {}

  // The columns [x, x + count) of an output row. False where a label is no class.
  bool select(int64_t image, int64_t y, int64_t x, int64_t count) {
    const Tensor& target = call_.target;
    const int row = target.ndim - 2;
    offset_ = image * target.stride[0] + y * target.stride[row] + x * target.stride[row + 1];
    count_ = count;
    if (!of_labels()) return true;
    fill(labels(), static_cast<Int<T>>(kIgnored));
    return read_label_run(call_, offset_, count, target.stride[row + 1], labels(), invalid_);
  }

  // Calls body with the shares of a class.
  template <class Body>
  FASTSEG_INLINE void with_class(int64_t c, const Body& body) {
    if (of_labels()) return body(LabelShares<T>{labels(), static_cast<Int<T>>(c)});
    const Tensor& target = call_.target;
    const int64_t stride = target.stride[3], offset = offset_ + c * target.stride[1];
    const void* const source = at(target, offset);
    const T ignored = static_cast<T>(call_.ignore_index);
    const bool whole = count_ % kPixelMultiple == 0 && stride == 1;
    if (whole && target.dtype == (sizeof(T) == sizeof(double) ? DType::kFloat64 : DType::kFloat32))
      return body(GivenShares<T>{static_cast<const T*>(source), ignored, 2 * target.stride[2]});
    fill(memory_, ignored);
    read_shares(source, stride);
    body(GivenShares<T>{memory_, ignored, 0});
  }

 private:
  const UpsampleSigmoidSums& call_;
  T* const memory_;
  InvalidLabel* const invalid_;
  int64_t offset_ = 0, count_ = 0;

  bool of_labels() const { return call_.target.ndim == 3; }
  Int<T>* labels() const { return reinterpret_cast<Int<T>*>(memory_); }

  // What is after the columns.
  template <class Value>
  void fill(Value* row, Value value) const {
    for (int64_t p = count_; p < round_up(count_, kPixelMultiple); ++p) row[p] = value;
  }

  void read_shares(const void* source, int64_t stride) {
    const auto read = [&](const auto* typed) {
      for (int64_t p = 0; p < count_; ++p) memory_[p] = static_cast<T>(typed[p * stride]);
    };
    switch (call_.target.dtype) {
      case DType::kUInt8:
        return read(static_cast<const uint8_t*>(source));
      case DType::kInt16:
        return read(static_cast<const int16_t*>(source));
      case DType::kInt32:
        return read(static_cast<const int32_t*>(source));
      case DType::kInt64:
        return read(static_cast<const int64_t*>(source));
      default:
        return pack(source, call_.target.dtype, 1, count_, 0, stride, memory_, 0);
    }
  }
};

// ---- forward ----

template <class T, Terms kTerms>
FASTSEG_INLINE void terms_of(Vec<T> logit, Vec<T> share, const FocalFactor<T>& focal, Vec<T> (&terms)[kSums<kTerms>]) {
  const Sigmoid<T> sigmoid(logit);
  // Where p is NaN, so is the smaller.
  terms[0] = kTerms == Terms::kSmallerSums ? (share < sigmoid.value ? share : sigmoid.value) : sigmoid.value * share;
  terms[1] = sigmoid.value;
  terms[2] = share;
  if constexpr (!kClassesAlone<kTerms>) {
    const Vec<T> log_sum = log_of_one_plus<T>(sigmoid.exponential);
    terms[3] = (positive_part<T>(-logit) + log_sum) * share;
    terms[4] = (positive_part<T>(logit) + log_sum) * (T(1) - share);
    terms[5] = broadcast<T>(1);
    if (kTerms == Terms::kFocal) {
      Vec<T> slope;
      focal(logit * (share * T(2) - T(1)), &terms[5], &slope);
      terms[3] *= terms[5];
      terms[4] *= terms[5];
    }
  }
}

template <class T>
FASTSEG_INLINE double sum_of_lanes(Vec<T> v) {
  typedef double Doubles __attribute__((vector_size(kLanes<T> * sizeof(double))));
  typedef double Pair __attribute__((vector_size(2 * sizeof(double))));
  const Doubles lanes = __builtin_convertvector(v, Doubles);
  Pair pairs[kLanes<T> / 2];
  memcpy(pairs, &lanes, sizeof lanes);
  for (int i = 1; i < kLanes<T> / 2; ++i) pairs[0] += pairs[i];
  return pairs[0][0] + pairs[0][1];
}

// Adds a class's terms, of the `count` columns of a block of which `logits` are the first, to the sums
// [kSums][classes].
template <class T, Terms kTerms, class Shares, class Logits>
FASTSEG_NOINLINE void add_terms(const Shares shares, const FocalFactor<T>& focal, int64_t c, int64_t count,
                                const Logits logits, double* sums, int64_t classes) {
  Vec<T> added[kSums<kTerms>] = {};
  for (int64_t p = 0; p < count; p += kLanes<T>) {
    Vec<T> terms[kSums<kTerms>];
    terms_of<T, kTerms>(logits(c, p), shares.share(p), focal, terms);
    for (int i = 0; i < kSums<kTerms>; ++i) added[i] = shares.counts(p) ? added[i] + terms[i] : added[i];
  }
  for (int i = 0; i < kSums<kTerms>; ++i) sums[i * classes + c] += sum_of_lanes<T>(added[i]);
}

template <class T, Terms kTerms>
bool forward_band(const UpsampleSigmoidSums& call, const UpsampledMap<T>& map, const Bands& bands, int64_t band,
                  InvalidLabel* invalid, double* sums) {
  const int64_t elements = Pieces<T>::padded(TargetRow<T>::elements(map));
  return with_expanded_rows(map, call.input, false, elements, [&](ExpandedRows<T>* source, Pieces<T>* pieces) {
    TargetRow<T> target(call, invalid, pieces->take(TargetRow<T>::elements(map)));
    const FocalFactor<T> focal(call);
    for_each_tile_row(map, bands, band, source,
                      [&](int64_t image, int64_t y, const RowPair<T>& pair, int64_t begin, int64_t columns) {
                        for (int64_t x = 0; x < columns; x += kColumnsAdded) {
                          const int64_t count = min_of(kColumnsAdded, columns - x);
                          if (!target.select(image, y, begin + x, count)) return false;
                          with_upsampled_row(map, pair, x, [&](const auto logits) {
                            for (int64_t c = 0; c < map.classes; ++c)
                              target.with_class(c, [&](const auto shares) {
                                add_terms<T, kTerms>(shares, focal, c, count, logits, sums, map.classes);
                              });
                          });
                        }
                        return true;
                      });
  });
}

template <class T, Terms kTerms>
void forward(const UpsampleSigmoidSums& call) {
  const UpsampledMap<T> map(call.grid, call.input, call.target, kRowsInCache);
  const Bands bands(map);
  const int64_t sums_of_band = kSums<kTerms> * map.classes;
  const BandSums sums(bands.count, sums_of_band);
  for_each_task(bands.count, call.threads, [&](int64_t band) {
    return forward_band<T, kTerms>(call, map, bands, band, &sums.partials()[band].invalid,
                                   sums.of_classes() + band * sums_of_band);
  });
  report_invalid(call, sums.partials(), bands.count);
  store_class_sums<T>(call.sums, map, bands, sums.of_classes());
}

// ---- backward ----

// The derivative of the terms, each multiplied by the gradient of its sum.
template <class T, Terms kTerms>
FASTSEG_INLINE Vec<T> derivative(Vec<T> logit, Vec<T> share, const FocalFactor<T>& focal, const T (&grad)[6]) {
  const Sigmoid<T> sigmoid(logit);
  // Where p and t are equal, torch.minimum halves the gradient.
  const Vec<T> of_overlap = kTerms == Terms::kSmallerSums
                                ? select_or_zero<T>(sigmoid.value < share, broadcast<T>(grad[0] / 2)) +
                                      select_or_zero<T>(sigmoid.value <= share, broadcast<T>(grad[0] / 2))
                                : share * grad[0];
  Vec<T> result = (of_overlap + grad[1]) * (sigmoid.value * sigmoid.counter);
  if constexpr (!kClassesAlone<kTerms>) {
    const Vec<T> of_own = share * grad[3], of_others = (T(1) - share) * grad[4];
    const Vec<T> of_losses = of_others * sigmoid.value - of_own * sigmoid.counter;
    if (kTerms == Terms::kCrossEntropy) return result + of_losses;
    const Vec<T> log_sum = log_of_one_plus<T>(sigmoid.exponential), sign = share * T(2) - T(1);
    const Vec<T> losses =
        of_own * (positive_part<T>(-logit) + log_sum) + of_others * (positive_part<T>(logit) + log_sum);
    Vec<T> factor, slope;
    focal(logit * sign, &factor, &slope);
    result += factor * of_losses + (losses + grad[5]) * (slope * sign);
  }
  return result;
}

// What is done to an output row.
template <class T, Terms kTerms>
class BackwardRows {
 public:
  static constexpr bool kRelative = false;
  static int64_t elements(const UpsampledMap<T>& map) { return Pieces<T>::padded(TargetRow<T>::elements(map)); }

  BackwardRows(const UpsampleSigmoidSumsBackward& call, const UpsampledMap<T>& map, const Place&, Partial* partial,
               Pieces<T>* pieces)
      : call_(call),
        map_(map),
        target_(call, &partial->invalid, pieces->take(TargetRow<T>::elements(map))),
        focal_(call) {}

  // keep(c, x, gradient) takes the gradients of the columns from x on.
  template <class Keep>
  bool row(const Place& place, int64_t y, const RowPair<T>& pair, const Keep& keep) {
    if (!target_.select(place.image, y, place.column, place.columns)) return false;
    with_upsampled_row(map_, pair, 0, [&](const auto logits) {
      for (int64_t c = 0; c < map_.classes; ++c)
        target_.with_class(c, [&](const auto shares) { differentiate_class(place, c, shares, logits, keep); });
    });
    return true;
  }

 private:
  const UpsampleSigmoidSumsBackward& call_;
  const UpsampledMap<T>& map_;
  TargetRow<T> target_;
  const FocalFactor<T> focal_;

  template <class Shares, class Logits, class Keep>
  FASTSEG_NOINLINE void differentiate_class(const Place& place, int64_t c, const Shares shares, const Logits logits,
                                            const Keep& keep) const {
    const Tensor& sums = call_.sums;
    T grad[6] = {};
    for (int i = 0; i < kSums<kTerms>; ++i)
      grad[i] =
          static_cast<const T*>(sums.data)[i * sums.stride[0] + place.image * sums.stride[1] + c * sums.stride[2]];
    for (int64_t p = 0; p < place.columns; p += kLanes<T>) {
      const Vec<T> gradient = derivative<T, kTerms>(logits(c, p), shares.share(p), focal_, grad);
      keep(c, p, select_or_zero<T>(shares.counts(p), gradient));
    }
  }
};

// Where input and output are of one size, an output row's gradients are the input's.
template <class T, Terms kTerms>
bool copied_band(const UpsampleSigmoidSumsBackward& call, const UpsampledMap<T>& map, const Bands& bands, int64_t band,
                 Partial* partial) {
  using Work = BackwardRows<T, kTerms>;
  const int64_t elements = Pieces<T>::padded(map.row_elements()) + Work::elements(map);
  return with_expanded_rows(map, call.input, false, elements, [&](ExpandedRows<T>* source, Pieces<T>* pieces) {
    T* const kept = pieces->take(map.row_elements());
    Place place = {};
    Work work(call, map, place, partial, pieces);
    const Tensor& gradient = call.grad_input;
    for_each_tile_row(
        map, bands, band, source,
        [&](int64_t image, int64_t y, const RowPair<T>& pair, int64_t begin, int64_t columns) {
          place.image = image;
          place.column = begin;
          place.columns = columns;
          const auto keep = [&](int64_t c, int64_t x, Vec<T> values) { store(kept + c * map.row_stride + x, values); };
          if (!work.row(place, y, pair, keep)) return false;
          const int64_t offset = image * gradient.stride[0] + y * gradient.stride[2] + begin * gradient.stride[3];
          unpack(kept, map.row_stride, map.classes, columns, at_mutable(gradient, offset), gradient.dtype,
                 gradient.stride[1], gradient.stride[3]);
          return true;
        });
  });
}

template <class T, Terms kTerms>
void backward(const UpsampleSigmoidSumsBackward& call) {
  const UpsampledMap<T> map(call.grid, call.input, call.target, kGradientRowsInCache);
  const bool copied = call.grid.mode == Mode::kNearest && !map.is_volume && map.height == map.output_height &&
                      map.width == map.output_width;
  const Bands rows(map);
  const InputBands bands(map);
  const int64_t count = copied ? rows.count : bands.count;
  const BandSums sums(count);
  if (copied)
    for_each_task(count, call.threads,
                  [&](int64_t band) { return copied_band<T, kTerms>(call, map, rows, band, sums.partials() + band); });
  else
    sum_gradients<T, BackwardRows<T, kTerms>>(call, map, bands, call.grad_input, sums.partials());
  report_invalid(call, sums.partials(), count);
}

// Calls run with the call's Instance.
template <class Run>
void with_instance(const UpsampleSigmoidSums& call, const Run& run) {
  if (call.sums.size[0] == kSums<Terms::kClassSums>)
    return call.smaller ? with_type<Terms::kSmallerSums>(call, run) : with_type<Terms::kClassSums>(call, run);
  return call.gamma == 0 ? with_type<Terms::kCrossEntropy>(call, run) : with_type<Terms::kFocal>(call, run);
}

}  // namespace

void upsample_sigmoid_sums_forward(const UpsampleSigmoidSums& call) {
  with_instance(call, [&](auto of) { forward<typename decltype(of)::T, of.kKind>(call); });
}

void upsample_sigmoid_sums_backward(const UpsampleSigmoidSumsBackward& call) {
  with_instance(call, [&](auto of) { backward<typename decltype(of)::T, of.kKind>(call); });
}

}  // namespace FASTSEG_ISA
}  // namespace fastseg

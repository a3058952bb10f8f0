// Activations to asymmetric uint8, one scale and zero point per row (or one static range).
#pragma once

#include <cfloat>
#include <cstring>
#include <limits>

#include "linear_problem.h"

namespace glmcompile {

// What a row goes through before it is rounded: nothing; each channel times its input scale
// (SmoothQuant); or RMS normalization, whose weight the input scale then holds as well.
enum class Input { kPlain, kScaled, kNormalized };

template <class V, Input kind>
struct Row {
  const float* x;
  const float* input_scale;

  auto scaled(typename V::F x, std::int64_t i) const {
    if constexpr (kind == Input::kPlain) return x;
    else return V::mul(x, V::load(input_scale + i));
  }
  auto load(std::int64_t i) const { return scaled(V::load(x + i), i); }
  auto load_n(std::int64_t i, std::int64_t n) const {
    const auto part = V::load_n(x + i, n);
    if constexpr (kind == Input::kPlain) return part;
    else return V::mul(part, V::load_n(input_scale + i, n));
  }
};

// Range of a row before normalization, and 1 / sqrt(mean(x^2) + epsilon), 1 where it has none.
struct RowRange {
  StaticRange range;
  float norm;
};

// The dynamic range of a row: scale = (max(x, 0) - min(x, 0)) / 255, zero_point = rne(-min / scale).
// A row without range (all zero, or subnormal) is quantized to zeros with scale 1; a row with NaN,
// infinities or a range (or squares) beyond float32 gets scale NaN, so that its outputs are NaN and
// no other's.
template <class V, Input kind>
inline RowRange row_range(Row<V, kind> row, std::int64_t n, float epsilon) {
  const auto zero = V::set(0.0f);
  auto low = zero, low2 = zero, high = zero, high2 = zero;
  // Neither minimum nor maximum sees NaN; a product with zero keeps NaN and turns infinity into it.
  // A sum of squares does so, too.
  auto sum = zero, sum2 = zero;
  const auto accumulate = [&](typename V::F x, typename V::F to) {
    return V::fma(x, kind == Input::kNormalized ? x : zero, to);
  };
  std::int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const auto x = V::load(row.x + i), x2 = V::load(row.x + i + 16);
    // The rows that follow, a page ahead: the processor's prefetchers stop at page borders.
    __builtin_prefetch(row.x + i + 1024);
    __builtin_prefetch(row.x + i + 1040);
    const auto a = row.scaled(x, i), b = row.scaled(x2, i + 16);
    low = V::min(a, low);
    low2 = V::min(b, low2);
    high = V::max(a, high);
    high2 = V::max(b, high2);
    sum = accumulate(x, sum);
    sum2 = accumulate(x2, sum2);
  }
  for (; i < n; i += 16) {
    const std::int64_t left = n - i < 16 ? n - i : 16;
    const auto a = row.load_n(i, left);
    low = V::min(a, low);
    high = V::max(a, high);
    sum = accumulate(V::load_n(row.x + i, left), sum);
  }
  const float lowest = V::reduce_min(V::min(low, low2));
  const float highest = V::reduce_max(V::max(high, high2));
  const float squares = V::reduce_sum(V::add(sum, sum2));
  const float scale = (highest - lowest) / 255.0f;
  if (!(squares <= FLT_MAX) || !(scale <= FLT_MAX)) {
    return {{std::numeric_limits<float>::quiet_NaN(), 0}, 1.0f};
  }
  const float norm = kind == Input::kNormalized
                         ? 1.0f / __builtin_sqrtf(squares / static_cast<float>(n) + epsilon)
                         : 1.0f;
  if (scale < FLT_MIN) return {{1.0f, 0}, norm};
  const float zero_point = __builtin_nearbyintf(-lowest * (1.0f / scale));
  return {{scale, static_cast<std::int32_t>(zero_point < 255.0f ? zero_point : 255.0f)}, norm};
}

// q = clamp(rne(x * (1 / scale)) + zero_point, 0, 255); elements from n to padded are zero.
// Normalization multiplies a whole row by one number, which leaves its q as they are and goes into
// the scale. T is how the kernel wants them: uint8, or int16 holding the same values.
template <class V, class T, Input kind>
void quantize(Row<V, kind> x, std::int64_t n, std::int64_t padded, const RowQuantizer& how, T* q,
              float* scale, std::int32_t* zero_point) {
  const bool dynamic = how.range.scale == 0.0f;
  const RowRange found = dynamic ? row_range(x, n, how.rms_epsilon) : RowRange{how.range, 1.0f};
  const StaticRange range = found.range;
  *scale = range.scale * found.norm;
  *zero_point = range.zero_point;
  if (!(range.scale == range.scale)) {
    std::memset(q, 0, static_cast<std::size_t>(padded) * sizeof(T));
    return;
  }
  const auto inverse = V::set(1.0f / range.scale);
  // A static range may be far exceeded: stay within int32. NaN takes the lower bound.
  const auto low = V::set(-512.0f), high = V::set(512.0f);
  const auto store = [&](T* to, typename V::F v) {
    v = V::mul(v, inverse);
    if (!dynamic) v = V::min(V::max(v, low), high);
    V::store_quantized(to, v, range.zero_point);
  };
  std::int64_t i = 0;
  for (; i + 16 <= n; i += 16) store(q + i, x.load(i));
  if (i < n) {
    T last[16];
    store(last, x.load_n(i, n - i));
    std::memcpy(q + i, last, static_cast<std::size_t>(n - i) * sizeof(T));
    i = n;
  }
  std::memset(q + i, 0, static_cast<std::size_t>(padded - i) * sizeof(T));
}

// The form in which LinearKernel takes it.
template <class V, class T>
void quantize_row(const float* x, std::int64_t n, std::int64_t padded, const RowQuantizer& how,
                  std::uint8_t* row, float* scale, std::int32_t* zero_point) {
  T* q = reinterpret_cast<T*>(row);
  const auto as = [&](auto input) { quantize(input, n, padded, how, q, scale, zero_point); };
  if (how.input_scale == nullptr) return as(Row<V, Input::kPlain>{x, nullptr});
  if (how.rms_epsilon == 0.0f) return as(Row<V, Input::kScaled>{x, how.input_scale});
  as(Row<V, Input::kNormalized>{x, how.input_scale});
}

}  // namespace glmcompile

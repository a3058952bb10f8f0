// Activations to asymmetric uint8, one scale and zero point per row (or one static range).
#pragma once

#include <cfloat>
#include <cstring>
#include <limits>

#include "linear_problem.h"

namespace glmcompile {

// A row of activations, each channel times its input scale where there is one (SmoothQuant).
template <class V, bool kScaled>
struct Row {
  const float* x;
  const float* input_scale;

  auto load(std::int64_t i) const {
    if constexpr (kScaled) return V::mul(V::load(x + i), V::load(input_scale + i));
    return V::load(x + i);
  }
  auto load_n(std::int64_t i, std::int64_t n) const {
    if constexpr (kScaled) return V::mul(V::load_n(x + i, n), V::load_n(input_scale + i, n));
    return V::load_n(x + i, n);
  }
};

// The dynamic range of a row: scale = (max(x, 0) - min(x, 0)) / 255, zero_point = rne(-min / scale).
// A row without range (all zero, or subnormal) is quantized to zeros with scale 1; a row with NaN,
// infinities or a range beyond float32 gets scale NaN, so that its outputs are NaN and no other's.
template <class V, bool kScaled>
inline StaticRange row_range(Row<V, kScaled> row, std::int64_t n) {
  const auto zero = V::set(0.0f);
  auto low = zero, low2 = zero, high = zero, high2 = zero;
  // Neither minimum nor maximum sees NaN; a product with zero keeps NaN and turns infinity into it.
  auto nan = zero, nan2 = zero;
  std::int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const auto a = row.load(i), b = row.load(i + 16);
    // The rows that follow, a page ahead: the processor's prefetchers stop at page borders.
    __builtin_prefetch(row.x + i + 1024);
    __builtin_prefetch(row.x + i + 1040);
    low = V::min(a, low);
    low2 = V::min(b, low2);
    high = V::max(a, high);
    high2 = V::max(b, high2);
    nan = V::fma(a, zero, nan);
    nan2 = V::fma(b, zero, nan2);
  }
  for (; i < n; i += 16) {
    const auto a = n - i >= 16 ? row.load(i) : row.load_n(i, n - i);
    low = V::min(a, low);
    high = V::max(a, high);
    nan = V::fma(a, zero, nan);
  }
  const float lowest = V::reduce_min(V::min(low, low2));
  const float highest = V::reduce_max(V::max(high, high2));
  const float scale = (highest - lowest) / 255.0f;
  if (V::any_nan(V::add(nan, nan2)) || !(scale <= FLT_MAX)) {
    return {std::numeric_limits<float>::quiet_NaN(), 0};
  }
  if (scale < FLT_MIN) return {1.0f, 0};
  const float zero_point = __builtin_nearbyintf(-lowest * (1.0f / scale));
  return {scale, static_cast<std::int32_t>(zero_point < 255.0f ? zero_point : 255.0f)};
}

// q = clamp(rne(x * (1 / scale)) + zero_point, 0, 255); elements from n to padded are zero.
// T is how the kernel wants them: uint8, or int16 holding the same values.
template <class V, class T, bool kScaled>
void quantize(Row<V, kScaled> x, std::int64_t n, std::int64_t padded, StaticRange range, T* q,
              float* scale, std::int32_t* zero_point) {
  const bool dynamic = range.scale == 0.0f;
  if (dynamic) range = row_range(x, n);
  *scale = range.scale;
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
void quantize_row(const float* x, const float* input_scale, std::int64_t n, std::int64_t padded,
                  StaticRange range, std::uint8_t* row, float* scale, std::int32_t* zero_point) {
  T* q = reinterpret_cast<T*>(row);
  if (input_scale != nullptr) {
    quantize(Row<V, true>{x, input_scale}, n, padded, range, q, scale, zero_point);
  } else {
    quantize(Row<V, false>{x, nullptr}, n, padded, range, q, scale, zero_point);
  }
}

}  // namespace glmcompile

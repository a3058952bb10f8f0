// Activations to asymmetric uint8, one scale and zero point per row (or one static range).
#pragma once

#include <cfloat>
#include <cstring>
#include <limits>

#include "linear_problem.h"

namespace glmcompile {

// The dynamic range of a row: scale = (max(x, 0) - min(x, 0)) / 255, zero_point = rne(-min / scale).
// A row without range (all zero, or subnormal) is quantized to zeros with scale 1; a row with NaN,
// infinities or a range beyond float32 gets scale NaN, so that its outputs are NaN and no other's.
template <class V>
inline StaticRange row_range(const float* x, std::int64_t n) {
  const auto zero = V::set(0.0f);
  auto low = zero, low2 = zero, high = zero, high2 = zero;
  // Neither minimum nor maximum sees NaN; a product with zero keeps NaN and turns infinity into it.
  auto nan = zero, nan2 = zero;
  std::int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const auto a = V::load(x + i), b = V::load(x + i + 16);
    // The rows that follow, a page ahead: the processor's prefetchers stop at page borders.
    __builtin_prefetch(x + i + 1024);
    __builtin_prefetch(x + i + 1040);
    low = V::min(a, low);
    low2 = V::min(b, low2);
    high = V::max(a, high);
    high2 = V::max(b, high2);
    nan = V::fma(a, zero, nan);
    nan2 = V::fma(b, zero, nan2);
  }
  for (; i < n; i += 16) {
    const auto a = n - i >= 16 ? V::load(x + i) : V::load_n(x + i, n - i);
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
template <class V, class T>
void quantize_row(const float* x, std::int64_t n, std::int64_t padded, StaticRange range,
                  std::uint8_t* row, float* scale, std::int32_t* zero_point) {
  T* q = reinterpret_cast<T*>(row);
  const bool dynamic = range.scale == 0.0f;
  if (dynamic) range = row_range<V>(x, n);
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
  for (; i + 16 <= n; i += 16) store(q + i, V::load(x + i));
  if (i < n) {
    T last[16];
    store(last, V::load_n(x + i, n - i));
    std::memcpy(q + i, last, static_cast<std::size_t>(n - i) * sizeof(T));
    i = n;
  }
  std::memset(q + i, 0, static_cast<std::size_t>(padded - i) * sizeof(T));
}

}  // namespace glmcompile

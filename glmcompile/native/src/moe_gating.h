// The activation between an expert's two layers and the weighted sum of experts, over a vector
// type V of sixteen lanes (linear_vec_*.h). Accuracy as in linear_epilogue.h.
#pragma once

#include <cstring>

#include "linear_epilogue.h"
#include "moe_kernels.h"

namespace glmcompile {
// Internal linkage: each instruction set's translation unit must keep its own copy.
namespace {

template <class V, ExpertActivation kind>
inline typename V::F activated(typename V::F x, [[maybe_unused]] float alpha) {
  using A = ExpertActivation;
  if constexpr (kind == A::kSilu) return silu<V>(x);
  if constexpr (kind == A::kGelu) return gelu<V>(x);
  if constexpr (kind == A::kGeluTanh) return gelu_tanh<V>(x);
  if constexpr (kind == A::kQuickGelu) return quick_gelu<V>(x);
  if constexpr (kind == A::kClampedSwiglu) {
    return over_one_plus_exp2<V>(x, V::mul(x, V::set(-alpha * kLog2E)));
  }
  const auto positive = V::max(V::set(0.0f), x);  // NaN stays NaN
  return kind == A::kRelu ? positive : V::mul(positive, positive);
}

// Minimum and maximum give their second operand where either is NaN: it must be x.
template <class V>
inline typename V::F at_most(float limit, typename V::F x) {
  return V::min(V::set(limit), x);
}
template <class V>
inline typename V::F at_least(float limit, typename V::F x) {
  return V::max(V::set(limit), x);
}

template <class V>
inline typename V::F load_strided(const float* from, std::int64_t step, std::int64_t n) {
  if (step == 1) return n == kMoELanes ? V::load(from) : V::load_n(from, n);
  float all[kMoELanes] = {};
  for (std::int64_t i = 0; i < n; ++i) all[i] = from[i * step];
  return V::load(all);
}

template <class V, ExpertActivation kind>
void activate_as(const Gating& g, const float* gate, const float* up, std::int64_t step,
                 std::int64_t n, float* out) {
  for (std::int64_t i = 0; i < n; i += kMoELanes) {
    const std::int64_t left = n - i < kMoELanes ? n - i : kMoELanes;
    auto y = at_most<V>(g.gate_limit, load_strided<V>(gate + i * step, step, left));
    y = at_most<V>(g.activated_limit, activated<V, kind>(y, g.alpha));
    if (up != nullptr) {
      auto factor = load_strided<V>(up + i * step, step, left);
      factor = at_least<V>(-g.up_limit, at_most<V>(g.up_limit, factor));
      if constexpr (kind == ExpertActivation::kClampedSwiglu) {
        factor = V::add(factor, V::set(1.0f));
      }
      y = V::mul(y, factor);
    }
    if (left == kMoELanes) V::store(out + i, y);
    else V::store_n(out + i, y, left);
  }
}

template <class V>
void activate(const Gating& g, const float* gate, const float* up, std::int64_t step,
              std::int64_t n, float* out) {
  using A = ExpertActivation;
  switch (g.activation) {
    case A::kSilu: return activate_as<V, A::kSilu>(g, gate, up, step, n, out);
    case A::kGelu: return activate_as<V, A::kGelu>(g, gate, up, step, n, out);
    case A::kGeluTanh: return activate_as<V, A::kGeluTanh>(g, gate, up, step, n, out);
    case A::kQuickGelu: return activate_as<V, A::kQuickGelu>(g, gate, up, step, n, out);
    case A::kRelu: return activate_as<V, A::kRelu>(g, gate, up, step, n, out);
    case A::kRelu2: return activate_as<V, A::kRelu2>(g, gate, up, step, n, out);
    case A::kClampedSwiglu: return activate_as<V, A::kClampedSwiglu>(g, gate, up, step, n, out);
  }
}

template <class V>
void combine(const float* const* rows, const float* weights, std::int64_t count, std::int64_t n,
             float* out) {
  for (std::int64_t at = 0; at < n; at += kMoELanes) {
    const std::int64_t left = n - at < kMoELanes ? n - at : kMoELanes;
    auto sum = V::set(0.0f);
    for (std::int64_t i = 0; i < count; ++i) {
      sum = V::fma(V::set(weights[i]), load_strided<V>(rows[i] + at, 1, left), sum);
    }
    if (left == kMoELanes) V::store(out + at, sum);
    else V::store_n(out + at, sum, left);
  }
}

}  // namespace
}  // namespace glmcompile

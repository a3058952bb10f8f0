// Functions that recurrent layers apply to activations, over a vector type (linear_vec_*.h), and
// access to whole and partial vectors.
//
// Everything here has internal linkage: each translation unit compiles it for its own instruction
// set, and the linker must not exchange one for another.
#pragma once

#include "recurrent_kernels.h"

namespace glmcompile {
namespace {

template <class V>
struct AllLanes {
  typename V::F load(const float* p) const { return V::load(p); }
  void store(float* p, typename V::F x) const { V::store(p, x); }
};

// The first `count` lanes, zeros beyond.
template <class V>
struct FirstLanes {
  std::int64_t count;
  typename V::F load(const float* p) const { return V::load_n(p, count); }
  void store(float* p, typename V::F x) const { V::store_n(p, x, count); }
};

// body(i, lanes) for every vector of `size` floats.
template <class V, class Body>
inline void for_vectors(std::int64_t size, const Body& body) {
  std::int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) body(i, AllLanes<V>{});
  if (i < size) body(i, FirstLanes<V>{size - i});
}

// c[0] x^(N - 1) + ... + c[N - 1].
template <class V, int N>
inline typename V::F polynomial(typename V::F x, const float (&c)[N]) {
  auto p = V::set(c[0]);
  for (int i = 1; i < N; ++i) p = V::fma(p, x, V::set(c[i]));
  return p;
}

// e^x within 2 units in the last place; exactly 1 at 0, so that a state which shall not decay does
// not, and down to 0 and up to infinity. e^x = 4^n e^r with |r| <= ln 2, where the Taylor series of
// degree 9 is within 1e-8; 2^n is multiplied twice, as 4^n may leave the range before e^x does.
template <class V>
inline typename V::F exp(typename V::F x) {
  // Operands in this order let a NaN through.
  x = V::max(V::set(-172.0f), V::min(V::set(172.0f), x));
  // Adding 1.5 * 2^23 rounds to an integer, which is left in the low bits of the sum.
  const auto magic = V::set(12582912.0f);
  const auto shifted = V::fma(x, V::set(0.72134752f), magic);
  const auto n = V::sub(shifted, magic);
  // 2 ln 2 in two parts, of which n times the first is exact.
  auto r = V::fma(n, V::set(-1.38671875f), x);
  r = V::fma(n, V::set(4.2438888e-4f), r);
  const auto p = polynomial<V>(r, {1.0f / 362880, 1.0f / 40320, 1.0f / 5040, 1.0f / 720,
                                   1.0f / 120, 1.0f / 24, 1.0f / 6, 1.0f / 2, 1.0f, 1.0f});
  const auto power = V::add_exponent(V::set(1.0f), shifted);
  return V::mul(V::mul(p, power), power);
}

// log(1 + e^x) = max(x, 0) + log(1 + e^-|x|), the logarithm as 2 artanh(s) with s = e / (2 + e) in
// [0, 1/3]: nine terms of its series are within 1e-9 of it, relative to itself even where it is
// tiny.
template <class V>
inline typename V::F softplus(typename V::F x) {
  const auto e = exp<V>(V::sub(V::set(0.0f), V::max(x, V::sub(V::set(0.0f), x))));
  const auto s = V::mul(e, V::reciprocal(V::add(e, V::set(2.0f))));
  const auto p = polynomial<V>(V::mul(s, s), {1.0f / 17, 1.0f / 15, 1.0f / 13, 1.0f / 11, 1.0f / 9,
                                              1.0f / 7, 1.0f / 5, 1.0f / 3, 1.0f});
  return V::fma(V::add(s, s), p, V::max(V::set(0.0f), x));
}

}  // namespace
}  // namespace glmcompile

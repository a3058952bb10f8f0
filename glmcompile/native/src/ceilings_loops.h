// The loops behind the ceilings, over a policy for the registers of an instruction set.
#pragma once

#include <cstring>

#include "ceilings.h"

namespace glmcompile {
// Internal linkage: each instruction set's translation unit must keep its own copy.
namespace {

constexpr int kMaxChains = 16;

// Keeps the compiler from dropping the work that led to `value`.
template <class T>
inline void keep(T value) {
  __asm__ volatile("" : : "m"(value));
}

// Makes the compiler take `value` for changed, so that it cannot work out a product beforehand.
template <class T>
inline void change(T& value) {
  __asm__ volatile("" : "+m"(value));
}

struct Operands {
  alignas(64) float values[16 * kMaxChains];

  Operands() {
    for (int i = 0; i < 16 * kMaxChains; ++i) values[i] = 1.0f / static_cast<float>(i + 3);
    change(values);
  }
  const float* at(int i) const { return values + 16 * i; }
};

// Several streams at once, and a prefetch ahead of each: one stream alone leaves some of the
// bandwidth unused.
template <class V>
void read(const float* data, std::int64_t count) {
  constexpr std::int64_t kStreams = 4, kVectors = 2, kAhead = 1024;
  static_assert(kReadStep == kStreams * kVectors * 16);
  typename V::F sum[kStreams][kVectors];
#pragma GCC unroll 4
  for (int s = 0; s < kStreams; ++s) {
#pragma GCC unroll 2
    for (int i = 0; i < kVectors; ++i) sum[s][i] = V::set(0.0f);
  }
  const std::int64_t part = count / kStreams;
  for (std::int64_t k = 0; k < part; k += kVectors * 16) {
#pragma GCC unroll 4
    for (int s = 0; s < kStreams; ++s) {
#pragma GCC unroll 2
      for (int i = 0; i < kVectors; ++i) {
        const float* at = data + s * part + k + 16 * i;
        __builtin_prefetch(at + kAhead, 0, 2);
        sum[s][i] = V::add(sum[s][i], V::load(at));
      }
    }
  }
#pragma GCC unroll 4
  for (int s = 0; s < kStreams; ++s) {
#pragma GCC unroll 2
    for (int i = 0; i < kVectors; ++i) keep(sum[s][i]);
  }
}

// P provides the register type T, load(floats), multiply_add(acc, a, b) and kMultiplies, the
// multiply-accumulates of one; where the product is an instruction of its own, it changes `a`
// before. chains: independent sums, enough to hide an instruction's latency and few enough to stay
// in registers.
template <class P, int chains>
std::int64_t multiply(std::int64_t rounds) {
  const Operands operands;
  auto a = P::load(operands.at(0));
  const auto b = P::load(operands.at(1));
  typename P::T sums[chains];
#pragma GCC unroll 16
  for (int i = 0; i < chains; ++i) sums[i] = P::load(operands.at(i));
  for (std::int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < chains; ++i) sums[i] = P::multiply_add(sums[i], a, b);
  }
#pragma GCC unroll 16
  for (int i = 0; i < chains; ++i) keep(sums[i]);
  return rounds * chains * P::kMultiplies * 2;
}

template <class V>
struct FloatProduct {
  using T = typename V::F;
  static constexpr int kMultiplies = 16;
  static T load(const float* from) { return V::load(from); }
  static T multiply_add(const T& acc, const T& a, const T& b) { return V::fma(a, b, acc); }
};

}  // namespace
}  // namespace glmcompile

// Sixteen float32 lanes in plain C++; compilers vectorise the fixed-length loops.
#pragma once

#include <cstdint>
#include <cstring>

namespace glmcompile {
// Internal linkage: each instruction set's translation unit must keep its own copy.
namespace {

struct VecPortable {
  struct F {
    float v[16];
  };
  struct I {
    std::int32_t v[16];
  };

  template <class Fn>
  static inline F map(Fn fn) {
    F r;
    for (int i = 0; i < 16; ++i) r.v[i] = fn(i);
    return r;
  }

  static F load(const float* p) {
    F r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
  }
  static F load_n(const float* p, std::int64_t n) {
    return map([=](int i) { return i < n ? p[i] : 0.0f; });
  }
  static void store(float* p, F x) { std::memcpy(p, x.v, sizeof x.v); }
  static void store_n(float* p, F x, std::int64_t n) {
    for (int i = 0; i < 16; ++i) {
      if (i < n) p[i] = x.v[i];
    }
  }
  static I load_int(const std::int32_t* p) {
    I r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
  }
  static I load_int_n(const std::int32_t* p, std::int64_t n) {
    I r;
    for (int i = 0; i < 16; ++i) r.v[i] = i < n ? p[i] : 0;
    return r;
  }
  static F set(float x) {
    return map([=](int) { return x; });
  }
  static F add(F a, F b) {
    return map([&](int i) { return a.v[i] + b.v[i]; });
  }
  static F sub(F a, F b) {
    return map([&](int i) { return a.v[i] - b.v[i]; });
  }
  static F mul(F a, F b) {
    return map([&](int i) { return a.v[i] * b.v[i]; });
  }
  // Fused exactly where the instruction set has it, so that every call site rounds alike.
  static F fma(F a, F b, F c) {
#ifdef __FP_FAST_FMAF
    return map([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); });
#else
    return map([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
#endif
  }
  // As x86: the second operand where either is NaN.
  static F min(F a, F b) {
    return map([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
  }
  static F max(F a, F b) {
    return map([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  // Adds the integer in the low bits of `shifted` to the exponent of x.
  static F add_exponent(F x, F shifted) {
    std::uint32_t bits[16], add[16];
    std::memcpy(bits, x.v, sizeof bits);
    std::memcpy(add, shifted.v, sizeof add);
    for (int i = 0; i < 16; ++i) bits[i] += add[i] << 23;
    F r;
    std::memcpy(r.v, bits, sizeof bits);
    return r;
  }
  // float(acc - zero_point * sum)
  static F correct(I acc, I sum, std::int32_t zero_point) {
    return map([&](int i) { return static_cast<float>(acc.v[i] - zero_point * sum.v[i]); });
  }
  static float reduce_min(F x) {
    float r = x.v[0];
    for (int i = 1; i < 16; ++i) r = x.v[i] < r ? x.v[i] : r;
    return r;
  }
  static float reduce_max(F x) {
    float r = x.v[0];
    for (int i = 1; i < 16; ++i) r = x.v[i] > r ? x.v[i] : r;
    return r;
  }
  static float reduce_sum(F x) {
    for (int half = 8; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) x.v[i] += x.v[half + i];
    }
    return x.v[0];
  }
  // 1 / x for positive x in [2^-8, 2^120].
  static F reciprocal(F x) {
    return map([&](int i) { return 1.0f / x.v[i]; });
  }
  // rne(x) + offset saturated to uint8, sixteen of them; |x| is at most 2^22.
  static void store_quantized(std::uint8_t* p, F x, std::int32_t offset) {
    const float magic = 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
    for (int i = 0; i < 16; ++i) {
      const std::int32_t q = static_cast<std::int32_t>((x.v[i] + magic) - magic) + offset;
      p[i] = static_cast<std::uint8_t>(q < 0 ? 0 : q > 255 ? 255 : q);
    }
  }
};

}  // namespace
}  // namespace glmcompile

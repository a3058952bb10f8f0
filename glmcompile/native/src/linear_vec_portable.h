// Sixteen float32 lanes in plain C++; compilers vectorise the fixed-length loops.
#pragma once

#include <cfloat>
#include <cmath>
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
  static F mul(F a, F b) {
    return map([&](int i) { return a.v[i] * b.v[i]; });
  }
  static F div(F a, F b) {
    return map([&](int i) { return a.v[i] / b.v[i]; });
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
  // To nearest even, for |x| < 2^22; larger magnitudes are already beyond every clamp here.
  static F round(F x) {
    return map([&](int i) {
      const float magic = 12582912.0f;
      const float a = std::fabs(x.v[i]);
      return a < 4194304.0f ? (x.v[i] + magic) - magic : x.v[i];
    });
  }
  // 2^n for integral n in [-126, 127].
  static F pow2(F n) {
    F r;
    for (int i = 0; i < 16; ++i) {
      const std::int32_t bits = (static_cast<std::int32_t>(n.v[i]) + 127) * (1 << 23);
      std::memcpy(&r.v[i], &bits, sizeof bits);
    }
    return r;
  }
  // x < 0 ? a : b
  static F select_negative(F x, F a, F b) {
    return map([&](int i) { return x.v[i] < 0.0f ? a.v[i] : b.v[i]; });
  }
  // float(acc - zero_point * sum)
  static F correct(I acc, I sum, std::int32_t zero_point) {
    return map([&](int i) { return static_cast<float>(acc.v[i] - zero_point * sum.v[i]); });
  }
  static bool all_finite(F x) {
    bool finite = true;
    for (int i = 0; i < 16; ++i) finite &= std::fabs(x.v[i]) <= FLT_MAX;
    return finite;
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
  // Integral values in [0, 255].
  static void store_quantized(std::uint8_t* p, F x) {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<std::uint8_t>(x.v[i]);
  }
};

}  // namespace
}  // namespace glmcompile

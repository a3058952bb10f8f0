// Four float32 lanes through the compiler's vector extension: SSE2 on x86-64, NEON on arm64.
#pragma once

#include <cstdint>
#include <cstring>

namespace glmcompile {
namespace {

struct VecPortable {
  static constexpr int kWidth = 4, kRows = 4, kVectors = 2;
  typedef float F __attribute__((vector_size(16)));
  typedef std::int32_t I __attribute__((vector_size(16)));

  static F load(const float* p) {
    F x;
    std::memcpy(&x, p, sizeof(x));
    return x;
  }
  static F load(const std::int8_t* p) {
    return F{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]),
             static_cast<float>(p[3])};
  }
  template <class T>
  static F load_n(const T* p, int) {  // head sizes are multiples of 8: never a partial vector
    return load(p);
  }
  static void store(float* p, F x) { std::memcpy(p, &x, sizeof(x)); }
  static F set(float x) { return F{x, x, x, x}; }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F div(F a, F b) { return a / b; }
  static F fma(F a, F b, F c) { return a * b + c; }
  static F max(F a, F b) { return a > b ? a : b; }
  // x - round(x), for x <= 0; anything in [-1/2, 1/2] from -127 on.
  static F fraction(F x) {
    x = max(x, set(-127.0f));
    return x - nearest(x);
  }
  // y * 2^round(x), for x <= 0; zero from -127 on.
  static F times_pow2(F y, F x) {
    const I bits = (__builtin_convertvector(nearest(max(x, set(-127.0f))), I) + 127) << 23;
    F factor;
    std::memcpy(&factor, &bits, sizeof(factor));
    return y * factor;
  }
  // Lanes [begin, end) of x, -inf elsewhere.
  static F keep(F x, int begin, int end) {
    const I lane = {0, 1, 2, 3};
    return (lane >= begin) & (lane < end) ? x : set(-__builtin_inff());
  }
  static float reduce_add(F x) { return (x[0] + x[2]) + (x[1] + x[3]); }
  static float reduce_max(F x) {
    const float a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
    return a > b ? a : b;
  }
  static void transpose(F* rows) {
    F out[4];
    for (int i = 0; i < 4; ++i) out[i] = F{rows[0][i], rows[1][i], rows[2][i], rows[3][i]};
    for (int i = 0; i < 4; ++i) rows[i] = out[i];
  }

 private:
  static F nearest(F x) {  // |x| < 2^22
    const F magic = set(12582912.0f);
    return (x + magic) - magic;
  }
};

}  // namespace
}  // namespace glmcompile

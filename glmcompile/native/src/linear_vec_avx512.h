// Sixteen float32 lanes in one AVX-512 register; the same operations as VecPortable.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
// GCC's own intrinsics start from a register left undefined on purpose.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include <cstdint>

namespace glmcompile {
namespace {

struct VecAvx512 {
  using F = __m512;
  using I = __m512i;

  static __mmask16 first(std::int64_t n) {
    return static_cast<__mmask16>((1u << static_cast<unsigned>(n)) - 1u);
  }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load_n(const float* p, std::int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static void store_n(float* p, F x, std::int64_t n) { _mm512_mask_storeu_ps(p, first(n), x); }
  static I load_int(const std::int32_t* p) { return _mm512_loadu_si512(p); }
  static I load_int_n(const std::int32_t* p, std::int64_t n) {
    return _mm512_maskz_loadu_epi32(first(n), p);
  }
  static F set(float x) { return _mm512_set1_ps(x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F add_exponent(F x, F shifted) {
    const I add = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x), add));
  }
  static F correct(I acc, I sum, std::int32_t zero_point) {
    const I offset = _mm512_mullo_epi32(_mm512_set1_epi32(zero_point), sum);
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(acc, offset));
  }
  static float reduce_min(F x) { return _mm512_reduce_min_ps(x); }
  static float reduce_max(F x) { return _mm512_reduce_max_ps(x); }
  static float reduce_sum(F x) { return _mm512_reduce_add_ps(x); }
  static F reciprocal(F x) {
    const F r = _mm512_rcp14_ps(x);
    return mul(r, _mm512_fnmadd_ps(x, r, set(2.0f)));
  }
  static I to_int(F x, std::int32_t offset) {
    return _mm512_add_epi32(_mm512_cvtps_epi32(x), _mm512_set1_epi32(offset));
  }
  static void store_quantized(std::uint8_t* p, F x, std::int32_t offset) {
    const I q = _mm512_max_epi32(to_int(x, offset), _mm512_setzero_si512());
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtusepi32_epi8(q));
  }
};

}  // namespace
}  // namespace glmcompile

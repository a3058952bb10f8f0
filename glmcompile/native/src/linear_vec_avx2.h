// Sixteen float32 lanes in two AVX2 registers; the same operations as VecPortable.
#pragma once

#include <immintrin.h>

#include <cfloat>
#include <cstdint>
#include <cstring>

namespace glmcompile {
namespace {

struct VecAvx2 {
  struct F {
    __m256 a, b;
  };
  struct I {
    __m256i a, b;
  };

  static F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static F load_n(const float* p, std::int64_t n) {
    float all[16] = {};
    std::memcpy(all, p, static_cast<std::size_t>(n) * sizeof *p);
    return load(all);
  }
  static void store(float* p, F x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
  }
  static void store_n(float* p, F x, std::int64_t n) {
    float all[16];
    store(all, x);
    std::memcpy(p, all, static_cast<std::size_t>(n) * sizeof *p);
  }
  static I load_int(const std::int32_t* p) {
    const auto* from = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)};
  }
  static I load_int_n(const std::int32_t* p, std::int64_t n) {
    std::int32_t all[16] = {};
    std::memcpy(all, p, static_cast<std::size_t>(n) * sizeof *p);
    return load_int(all);
  }
  static F set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  static F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
  static F fma(F x, F y, F z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
  }
  static F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
  static F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
  static F round(F x) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
  }
  static __m256 pow2(__m256 n) {
    const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
  }
  static F pow2(F n) { return {pow2(n.a), pow2(n.b)}; }
  // The blend reads the sign bit; x is never -0 where a and b differ.
  static F select_negative(F x, F y, F z) {
    return {_mm256_blendv_ps(z.a, y.a, x.a), _mm256_blendv_ps(z.b, y.b, x.b)};
  }
  static F correct(I acc, I sum, std::int32_t zero_point) {
    const __m256i z = _mm256_set1_epi32(zero_point);
    return {_mm256_cvtepi32_ps(_mm256_sub_epi32(acc.a, _mm256_mullo_epi32(z, sum.a))),
            _mm256_cvtepi32_ps(_mm256_sub_epi32(acc.b, _mm256_mullo_epi32(z, sum.b)))};
  }
  static bool all_finite(F x) {
    const __m256 largest = _mm256_set1_ps(FLT_MAX), sign = _mm256_set1_ps(-0.0f);
    const __m256 a = _mm256_cmp_ps(_mm256_andnot_ps(sign, x.a), largest, _CMP_NLE_UQ);
    const __m256 b = _mm256_cmp_ps(_mm256_andnot_ps(sign, x.b), largest, _CMP_NLE_UQ);
    return _mm256_movemask_ps(_mm256_or_ps(a, b)) == 0;
  }
  static float reduce_min(F x) {
    float all[16];
    store(all, x);
    float r = all[0];
    for (float v : all) r = v < r ? v : r;
    return r;
  }
  static float reduce_max(F x) {
    float all[16];
    store(all, x);
    float r = all[0];
    for (float v : all) r = v > r ? v : r;
    return r;
  }
  // Sixteen int16 of integral lanes in [0, 255].
  static __m256i to_int16(F x) {
    const __m256i packed = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
    return _mm256_permute4x64_epi64(packed, 0xd8);
  }
  static void store_quantized(std::int16_t* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_int16(x));
  }
  static void store_quantized(std::uint8_t* p, F x) {
    const __m256i words = to_int16(x);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packus_epi16(_mm256_castsi256_si128(words),
                                      _mm256_extracti128_si256(words, 1)));
  }
};

}  // namespace
}  // namespace glmcompile

// Sixteen float32 lanes in two AVX2 registers; the same operations as VecPortable.
#pragma once

#include <immintrin.h>

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
  static F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
  static F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static F fma(F x, F y, F z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
  }
  static F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
  static F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
  static __m256 add_exponent(__m256 x, __m256 shifted) {
    const __m256i add = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), add));
  }
  static F add_exponent(F x, F shifted) {
    return {add_exponent(x.a, shifted.a), add_exponent(x.b, shifted.b)};
  }
  static F correct(I acc, I sum, std::int32_t zero_point) {
    const __m256i z = _mm256_set1_epi32(zero_point);
    return {_mm256_cvtepi32_ps(_mm256_sub_epi32(acc.a, _mm256_mullo_epi32(z, sum.a))),
            _mm256_cvtepi32_ps(_mm256_sub_epi32(acc.b, _mm256_mullo_epi32(z, sum.b)))};
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
  static float reduce_sum(F x) {
    const __m256 eight = _mm256_add_ps(x.a, x.b);
    const __m128 four =
        _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  static F reciprocal(F x) {
    const __m256 one = _mm256_set1_ps(1.0f);
    return {_mm256_div_ps(one, x.a), _mm256_div_ps(one, x.b)};
  }
  // Sixteen int16: rne(x) + offset saturated to uint8.
  static __m256i to_int16(F x, std::int32_t offset) {
    const __m256i z = _mm256_set1_epi32(offset), last = _mm256_set1_epi16(255);
    const __m256i packed = _mm256_packus_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(x.a), z),
                                               _mm256_add_epi32(_mm256_cvtps_epi32(x.b), z));
    return _mm256_permute4x64_epi64(_mm256_min_epu16(packed, last), 0xd8);
  }
  static void store_quantized(std::int16_t* p, F x, std::int32_t offset) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_int16(x, offset));
  }
  static void store_quantized(std::uint8_t* p, F x, std::int32_t offset) {
    const __m256i words = to_int16(x, offset);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packus_epi16(_mm256_castsi256_si128(words),
                                      _mm256_extracti128_si256(words, 1)));
  }
};

}  // namespace
}  // namespace glmcompile

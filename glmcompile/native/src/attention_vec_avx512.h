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
  static constexpr int kWidth = 16, kRows = 6, kVectors = 4;
  using F = __m512;

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load(const std::int8_t* p) {
    return _mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static F load_n(const float* p, int n) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p);
  }
  static F load_n(const std::int8_t* p, int n) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(
        _mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << n) - 1u), p)));
  }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F set(float x) { return _mm512_set1_ps(x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F fraction(F x) {  // 0 for -inf
    return _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static F times_pow2(F y, F x) {
    const __mmask16 normal = _mm512_cmp_ps_mask(x, set(-127.0f), _CMP_GT_OQ);
    const F n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm512_maskz_scalef_ps(normal, y, n);
  }
  static F keep(F x, int begin, int end) {
    const unsigned low = (1u << begin) - 1u, high = (1u << end) - 1u;
    return _mm512_mask_mov_ps(set(-__builtin_inff()), static_cast<__mmask16>(high & ~low), x);
  }
  static float reduce_add(F x) { return _mm512_reduce_add_ps(x); }
  static float reduce_max(F x) { return _mm512_reduce_max_ps(x); }
  static void transpose(F* r) {
    F a[16], b[16];
    for (int i = 0; i < 8; ++i) {
      a[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
      a[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
      b[4 * i] = _mm512_shuffle_ps(a[4 * i], a[4 * i + 2], 0x44);
      b[4 * i + 1] = _mm512_shuffle_ps(a[4 * i], a[4 * i + 2], 0xee);
      b[4 * i + 2] = _mm512_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0x44);
      b[4 * i + 3] = _mm512_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      const F even0 = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88);
      const F odd0 = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xdd);
      const F even1 = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88);
      const F odd1 = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xdd);
      r[i] = _mm512_shuffle_f32x4(even0, even1, 0x88);
      r[i + 8] = _mm512_shuffle_f32x4(even0, even1, 0xdd);
      r[i + 4] = _mm512_shuffle_f32x4(odd0, odd1, 0x88);
      r[i + 12] = _mm512_shuffle_f32x4(odd0, odd1, 0xdd);
    }
  }
};

}  // namespace
}  // namespace glmcompile

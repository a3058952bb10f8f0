// Mixture-of-experts kernels for AVX-512: 24 of 32 registers hold sums.
#include "linear_vec_avx512.h"
#include "moe_gating.h"
#include "moe_multiply.h"

namespace glmcompile {
namespace {

struct TileAvx512 {
  using V = VecAvx512;
  static constexpr int kRows = 6, kColumns = 4;

  // Four sums at once take a third of the shuffles of four sums one by one.
  static void sum_channels(const V::F* acc, float* sums) {
    const __m512 even = _mm512_add_ps(_mm512_unpacklo_ps(acc[0], acc[1]),
                                      _mm512_unpackhi_ps(acc[0], acc[1]));
    const __m512 odd = _mm512_add_ps(_mm512_unpacklo_ps(acc[2], acc[3]),
                                     _mm512_unpackhi_ps(acc[2], acc[3]));
    const __m512 quarters = _mm512_add_ps(_mm512_shuffle_ps(even, odd, 0x44),
                                          _mm512_shuffle_ps(even, odd, 0xee));
    const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters),
                                        _mm512_extractf32x8_ps(quarters, 1));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(halves),
                                   _mm256_extractf128_ps(halves, 1)));
  }
};

}  // namespace

const MoEKernels& moe_kernels_avx512() {
  static const MoEKernels kernels = {multiply<TileAvx512>, activate<VecAvx512>,
                                     combine<VecAvx512>};
  return kernels;
}

}  // namespace glmcompile

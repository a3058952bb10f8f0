// W8A8 linear kernel for AVX2 without VNNI. vpmaddubsw would saturate, so activations are stored
// as int16 and weights widened in registers: vpmaddwd is exact.
#include "linear_driver.h"
#include "linear_vec_avx2.h"
#include "quantize_rows.h"

namespace glmcompile {
namespace {

constexpr int kTileRows = 3;

// tile [rows][32], columns 0-15 = `rows` rows of int16 times one block of 16 channels.
template <int rows>
void multiply_block(const std::uint8_t* a, std::int64_t stride, const std::int8_t* w,
                    std::int64_t k_blocks, std::int32_t* tile) {
  // Each register holds, for four channels, two partial sums: over k % 4 in {0, 1} and {2, 3}.
  __m256i acc[rows][4];
#pragma GCC unroll 3
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) acc[r][j] = _mm256_setzero_si256();
  }
  for (std::int64_t k4 = 0; k4 < k_blocks * (kBlockK / 4); ++k4) {
    __m256i q[rows];
#pragma GCC unroll 3
    for (int r = 0; r < rows; ++r) {
      long long four;
      std::memcpy(&four, a + r * stride + k4 * 8, sizeof four);
      q[r] = _mm256_set1_epi64x(four);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m256i b = _mm256_cvtepi8_epi16(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + k4 * 64 + j * 16)));
#pragma GCC unroll 3
      for (int r = 0; r < rows; ++r) {
        acc[r][j] = _mm256_add_epi32(acc[r][j], _mm256_madd_epi16(q[r], b));
      }
    }
  }
#pragma GCC unroll 3
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m256i sums = _mm256_hadd_epi32(acc[r][2 * half], acc[r][2 * half + 1]);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(tile + r * 2 * kBlockN + half * 8),
                          _mm256_permute4x64_epi64(sums, 0xd8));
    }
  }
}

struct TileAvx2 {
  static constexpr std::int64_t kRows = kTileRows;

  static void multiply(const std::uint8_t* a, std::int64_t stride, std::int64_t rows,
                       const std::int8_t* w, std::int64_t block_bytes, std::int64_t blocks,
                       std::int64_t k_blocks, WeightsAhead&, EpilogueAhead& epilogue,
                       std::int32_t* tile) {
    epilogue.all();
    for (std::int64_t b = 0; b < blocks; ++b, w += block_bytes, tile += kBlockN) {
      if (rows == 1) multiply_block<1>(a, stride, w, k_blocks, tile);
      if (rows == 2) multiply_block<2>(a, stride, w, k_blocks, tile);
      if (rows == 3) multiply_block<3>(a, stride, w, k_blocks, tile);
    }
  }
};

}  // namespace

const LinearKernel& linear_kernel_avx2() {
  static const LinearKernel kernel = {"avx2", TileAvx2::kRows, sizeof(std::int16_t),
                                      quantize_row<VecAvx2, std::int16_t>,
                                      multiply_tiles<VecAvx2, TileAvx2>};
  return kernel;
}

}  // namespace glmcompile

// W8A8 linear kernel for AVX2 processors with VEX-encoded VNNI: tiles of up to 6 rows x 16
// channels.
#include "linear_driver.h"
#include "linear_vec_avx2.h"
#include "quantize_rows.h"

namespace glmcompile {
namespace {

constexpr int kTileRows = 6;

// tile [rows][32], columns 0-15 = `rows` rows of uint8 times one block of 16 channels.
template <int rows>
void multiply_block(const std::uint8_t* a, std::int64_t stride, const std::int8_t* w,
                    std::int64_t k_blocks, std::int32_t* tile) {
  __m256i low[rows], high[rows];
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) low[r] = high[r] = _mm256_setzero_si256();
  for (std::int64_t k4 = 0; k4 < k_blocks * (kBlockK / 4); ++k4) {
    const auto* from = reinterpret_cast<const __m256i*>(w + k4 * 64);
    const __m256i b0 = _mm256_loadu_si256(from), b1 = _mm256_loadu_si256(from + 1);
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      std::int32_t four;
      std::memcpy(&four, a + r * stride + k4 * 4, sizeof four);
      const __m256i q = _mm256_set1_epi32(four);
      low[r] = _mm256_dpbusd_avx_epi32(low[r], q, b0);
      high[r] = _mm256_dpbusd_avx_epi32(high[r], q, b1);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
    auto* to = reinterpret_cast<__m256i*>(tile + r * 2 * kBlockN);
    _mm256_storeu_si256(to, low[r]);
    _mm256_storeu_si256(to + 1, high[r]);
  }
}

constexpr decltype(&multiply_block<1>) kMultiplyBlock[kTileRows] = {
    multiply_block<1>, multiply_block<2>, multiply_block<3>,
    multiply_block<4>, multiply_block<5>, multiply_block<6>,
};

struct TileAvxVnni {
  static constexpr std::int64_t kRows = kTileRows;

  static void multiply(const std::uint8_t* a, std::int64_t stride, std::int64_t rows,
                       const std::int8_t* w, std::int64_t block_bytes, std::int64_t blocks,
                       std::int64_t k_blocks, WeightsAhead&, EpilogueAhead& epilogue,
                       std::int32_t* tile) {
    epilogue.all();
    for (std::int64_t b = 0; b < blocks; ++b) {
      kMultiplyBlock[rows - 1](a, stride, w + b * block_bytes, k_blocks, tile + b * kBlockN);
    }
  }
};

}  // namespace

const LinearKernel& linear_kernel_avxvnni() {
  static const LinearKernel kernel = {"avxvnni", TileAvxVnni::kRows, sizeof(std::uint8_t),
                                      quantize_row<VecAvx2, std::uint8_t>,
                                      multiply_tiles<VecAvx2, TileAvxVnni>};
  return kernel;
}

}  // namespace glmcompile

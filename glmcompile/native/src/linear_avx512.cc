// W8A8 linear kernel for AVX-512 with VNNI: register tiles of up to 12 rows x 32 channels.
#include "linear_driver.h"
#include "linear_vec_avx512.h"
#include "quantize_rows.h"

namespace glmcompile {
namespace {

constexpr int kTileRows = 12;
constexpr int kTileBlocks = 2;
constexpr std::int64_t kTileStride = kTileBlocks * kBlockN;

inline __m512i broadcast4(const std::uint8_t* p) {
  std::int32_t word;
  std::memcpy(&word, p, sizeof word);
  return _mm512_set1_epi32(word);
}

// tile [rows][32] = `rows` rows of uint8 times `blocks` blocks of 16 channels.
template <int rows, int blocks>
void multiply_tile(const std::uint8_t* a, std::int64_t stride, const std::int8_t* w,
                   std::int64_t block_bytes, std::int64_t k_blocks, WeightsAhead& group_ahead,
                   EpilogueAhead& epilogue, std::int32_t* tile) {
  __m512i acc[rows][blocks];
  WeightsAhead ahead = group_ahead;
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int b = 0; b < blocks; ++b) acc[r][b] = _mm512_setzero_si512();
  }
  // One pointer for three rows: base, base + stride and base + 2 * stride are addressing modes.
  constexpr int groups = (rows + 2) / 3;
  const std::uint8_t* base[groups];
#pragma GCC unroll 4
  for (int g = 0; g < groups; ++g) base[g] = a + 3 * g * stride;
  for (std::int64_t kb = 0; kb < k_blocks; ++kb) {
    epilogue.step();
#pragma GCC unroll 16
    for (int k4 = 0; k4 < 16; ++k4) {
      __m512i b[blocks];
#pragma GCC unroll 2
      for (int j = 0; j < blocks; ++j) b[j] = _mm512_loadu_si512(w + j * block_bytes + k4 * 64);
      // One or two rows are nothing but a stream, which the processor's own prefetcher follows.
      if constexpr (rows > 2) {
#pragma GCC unroll 2
        for (int j = 0; j < blocks; ++j) {
          _mm_prefetch(ahead.at + (2 * k4 + j) * ahead.step, _MM_HINT_T1);
        }
      }
#pragma GCC unroll 12
      for (int r = 0; r < rows; ++r) {
        const __m512i q = broadcast4(base[r / 3] + (r % 3) * stride + k4 * 4);
#pragma GCC unroll 2
        for (int j = 0; j < blocks; ++j) acc[r][j] = _mm512_dpbusd_epi32(acc[r][j], q, b[j]);
      }
    }
    ahead.at += WeightsAhead::kPerBlock * ahead.step;
    w += kBlockK * kBlockN;
#pragma GCC unroll 4
    for (int g = 0; g < groups; ++g) base[g] += kBlockK;
  }
  group_ahead = ahead;
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int j = 0; j < blocks; ++j) {
      _mm512_store_si512(tile + r * kTileStride + j * kBlockN, acc[r][j]);
    }
  }
}

constexpr decltype(&multiply_tile<1, 1>) kMultiplyTile[kTileRows][kTileBlocks] = {
    {multiply_tile<1, 1>, multiply_tile<1, 2>},   {multiply_tile<2, 1>, multiply_tile<2, 2>},
    {multiply_tile<3, 1>, multiply_tile<3, 2>},   {multiply_tile<4, 1>, multiply_tile<4, 2>},
    {multiply_tile<5, 1>, multiply_tile<5, 2>},   {multiply_tile<6, 1>, multiply_tile<6, 2>},
    {multiply_tile<7, 1>, multiply_tile<7, 2>},   {multiply_tile<8, 1>, multiply_tile<8, 2>},
    {multiply_tile<9, 1>, multiply_tile<9, 2>},   {multiply_tile<10, 1>, multiply_tile<10, 2>},
    {multiply_tile<11, 1>, multiply_tile<11, 2>}, {multiply_tile<12, 1>, multiply_tile<12, 2>},
};

struct TileAvx512 {
  static constexpr std::int64_t kRows = kTileRows;

  static void multiply(const std::uint8_t* a, std::int64_t stride, std::int64_t rows,
                       const std::int8_t* w, std::int64_t block_bytes, std::int64_t blocks,
                       std::int64_t k_blocks, WeightsAhead& ahead, EpilogueAhead& epilogue,
                       std::int32_t* tile) {
    kMultiplyTile[rows - 1][blocks - 1](a, stride, w, block_bytes, k_blocks, ahead, epilogue,
                                        tile);
  }
};

}  // namespace

const LinearKernel& linear_kernel_avx512() {
  static const LinearKernel kernel = {"avx512", TileAvx512::kRows, sizeof(std::uint8_t),
                                      quantize_row<VecAvx512, std::uint8_t>,
                                      multiply_tiles<VecAvx512, TileAvx512>};
  return kernel;
}

}  // namespace glmcompile
